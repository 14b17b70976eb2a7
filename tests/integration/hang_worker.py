"""One rank of a training run that hangs on purpose: `hang_worker.py KIND:RANK,KIND:RANK,... key=value ...`.

Attempt n gets the n-th fault, in that rank's fourth step; attempts after the last fault run to the end. The trainer knows nothing
of it: what hangs is put around its functions from outside.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

AT_CALL = 4
RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ.get("SLOTSTREAM_ATTEMPT", 1))


def at_call(owner: Any, name: str, instead: Callable[..., Any]) -> None:
    """Have call AT_CALL of owner.name run `instead`, with the function itself as its first argument."""
    function, calls = getattr(owner, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return instead(function, *args, **kwargs) if calls == AT_CALL else function(*args, **kwargs)

    setattr(owner, name, call)


def stop_itself(function: Callable, *args: Any, **kwargs: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSTOP)
    return function(*args, **kwargs)


def wait_for_nothing(function: Callable, *args: Any, **kwargs: Any) -> Any:
    threading.Event().wait()


def lock_twice(function: Callable, *args: Any, **kwargs: Any) -> Any:
    lock = threading.Lock()
    with lock:
        lock.acquire()


def stop_in_forward() -> None:
    from trainer import step

    at_call(step, "choose_passes", stop_itself)


def skip_a_collective() -> None:
    from trainer import step

    # what all other ranks do in step.py; this one goes on without
    at_call(step, "_global_counts", lambda function, local, coupled, device: counts_alone(step, function, local, coupled, device))


def counts_alone(step: Any, function: Callable, local: Any, coupled: Any, device: Any) -> Any:
    together, step.distributed.all_sum = step.distributed.all_sum, lambda values, group=None: values
    try:
        return function(local, coupled, device)
    finally:
        step.distributed.all_sum = together


def stick_the_loader() -> None:
    from trainer.device_feed import DeviceFeed

    at_call(DeviceFeed, "__next__", wait_for_nothing)


def lock_the_save() -> None:
    from trainer.checkpoint_saver import Saver

    at_call(Saver, "save", lock_twice)


FAULTS = {"stop": stop_in_forward, "skip": skip_a_collective, "loader": stick_the_loader, "save": lock_the_save}

if __name__ == "__main__":
    from trainer.main import main
    from trainer.process import run_as_rank

    faults, sys.argv[1:] = sys.argv[1].split(","), sys.argv[2:]
    kind, _, where = faults[ATTEMPT - 1].partition(":") if len(faults) >= ATTEMPT else ("", "", "")
    if where == str(RANK):
        FAULTS[kind]()
    run_as_rank(main)
