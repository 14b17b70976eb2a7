"""This process as one rank: its threads, its memory, and the one door out. No torch import at module level."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable

LOST_PEER = re.compile(
    r"connection (was )?(reset|closed|refused)|broken pipe|remote process exited|timed out waiting \d+ms for", re.IGNORECASE
)


def set_threads(threads: int) -> None:
    """parallel.threads, else OMP_NUM_THREADS as the launcher set it, else this rank's share of the usable cores."""
    import torch

    if not threads and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if threads:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of giving it back: a CPU step frees and takes the same large tensors again and again,
    and fresh pages cost a quarter of its time. No effect where there is no glibc."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_MMAP_MAX, 0)


def answer_stack_requests() -> None:
    """Have the signal SIGRTMIN+6 append the stacks of all threads to the file of SLOTSTREAM_STACKS, if it is set.

    It works where Python's own handlers do not: in a collective that hangs, or while a lock is waited for.
    """
    path = os.environ.get("SLOTSTREAM_STACKS")
    if path and hasattr(signal, "SIGRTMIN"):
        with contextlib.suppress(OSError):
            faulthandler.register(signal.SIGRTMIN + 6, open(path, "ab", buffering=0), all_threads=True)  # noqa: SIM115


def leave(code: int) -> None:
    """End this rank. Everything is written and closed by now: skip the interpreter's teardown, where gloo's threads now and then
    abort a process that has done its work, which the launcher would take for a failure."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk under this rank's output must not change its exit code
            stream.flush()
    os._exit(code)


def run_as_rank(command: Callable[[list[str]], int | None]) -> None:
    """Run a command to its end as one rank: every way out is an exit code, none goes through the interpreter's teardown."""
    from data_pipeline.compose import run_command
    from data_pipeline.errors import say_error

    answer_stack_requests()
    code = 1
    try:
        code = run_command(command)
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else 1
    except RuntimeError as error:
        if not LOST_PEER.search(str(error)):
            say_error(traceback.format_exc())
        else:
            say_error(f"error: lost contact with another rank; see its log for the cause ({str(error).splitlines()[0][:160]})")
    except BaseException:
        say_error(traceback.format_exc())
    leave(code)
