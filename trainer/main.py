"""The trainer's door: configuration, run folder, process group, train, teardown. One process of this is one rank.

`python -m trainer.main [experiment=NAME] [group=member] [key=value ...]`; cluster/launch.py starts many of it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.config import RunConfig
    from trainer.preemption import StopRequest

HELP = """python -m trainer.main [experiment=NAME] [group=member ...] [key=value ...]

Trains one model on shards, as one rank; `python cluster/launch.py --nodes N` starts as many as you have.

  experiment=ssync_movi_c     a published experiment: see configs/experiment/
  name=my_run                 run folder runs/my_run; the same name goes on where the last attempt stopped
  data.root=FOLDER            shards, made by python -m data_pipeline.build
  objective=ssync             group members: see configs/{data,model,objective,optim,parallel,observe}/
  optim.max_steps=1000        any setting by its full key

Exit codes: 0 done, 75 stopped on request after a checkpoint (start it again), 2 a setting or a file is wrong, others failure.
"""


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP, end="")
        return 0
    from trainer.preemption import StopRequest

    stop = StopRequest().install()  # before the slow imports: a stop request that comes early is kept
    from data_pipeline.compose import compose
    from trainer.config import RunConfig

    return _train(compose("train", RunConfig, argv), stop)


def _train(config: RunConfig, stop: StopRequest) -> int:
    from trainer import distributed, run_folder

    world = distributed.world_from_environment()
    _set_threads(config.parallel.threads)
    _keep_freed_memory()
    from trainer.engine import choose_device
    from trainer.step import NonFiniteLoss
    from trainer.train_loop import Training

    run = run_folder.folder_of(config)
    distributed.start(choose_device(config.parallel.device), config.parallel.timeout_s)
    attempt = distributed.from_main(run_folder.attempt_of(run))
    _prepare_folder(run, config, attempt, is_main=world.rank == 0)
    training = Training(config, world, run, attempt, stop)
    try:
        return training.run_to_end()
    except NonFiniteLoss as error:
        training.observer.non_finite()
        saved = f"step {training.saved_step}" if training.saved_step >= 0 else "none"
        raise NonFiniteLoss(f"{error}; last good checkpoint: {saved}") from None
    finally:
        training.close()


def _prepare_folder(run: Path, config: RunConfig, attempt: int, is_main: bool) -> None:
    """Rank 0 makes the run folder; a refusal reaches all ranks, so that none waits for it."""
    from data_pipeline.errors import ConfigError
    from trainer import distributed, run_folder

    refusal = None
    if is_main:
        try:
            run_folder.prepare(run, config, attempt)
        except ConfigError as error:
            refusal = str(error)
    refusal = distributed.from_main(refusal)
    if refusal:
        raise ConfigError(refusal)


def _set_threads(threads: int) -> None:
    """parallel.threads, else OMP_NUM_THREADS as the launcher set it, else this rank's share of the usable cores."""
    import torch

    if not threads and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if threads:
        torch.set_num_threads(threads)


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of giving it back: a CPU step frees and takes the same large tensors again and again,
    and fresh pages cost a quarter of its time. No effect where there is no glibc."""
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_MMAP_MAX, 0)


def leave(code: int) -> None:
    """End this rank. Everything is written and closed by now: skip the interpreter's teardown, where gloo's threads now and then
    abort a process that has done its work, which the launcher would take for a failure."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_as_rank(command: Callable[[list[str]], int | None]) -> None:
    """Run a command to its end as one rank: every way out is an exit code, none goes through the interpreter's teardown."""
    from data_pipeline.compose import run_command

    code = 1
    try:
        code = run_command(command)
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else 1
    except BaseException:
        traceback.print_exc()
    leave(code)


if __name__ == "__main__":
    run_as_rank(main)
