"""The trainer's door: configuration, run folder, process group, train, teardown. One process of this is one rank.

`python -m trainer.main [experiment=NAME] [group=member] [key=value ...]`; cluster/launch.py starts many of it.
"""

from __future__ import annotations

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
  data.input=frames           take features in every step, of the frames in the shards; features: read them from the shards
  objective=ssync             group members: see configs/{data,model,objective,optim,parallel,observe}/
  optim.max_steps=1000        any setting by its full key

Exit codes: 0 done, 75 stopped on request after a checkpoint (start it again), 2 a setting or a file is wrong, 74 the disk
refuses what must be written (mend it, start it again), others failure.
"""


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP, end="")
        return 0
    from trainer import heartbeat
    from trainer.preemption import StopRequest

    heartbeat.start()
    stop = StopRequest().install()  # before the slow imports: a stop request that comes early is kept
    from data_pipeline.compose import compose
    from trainer.config import RunConfig

    return _train(compose("train", RunConfig, argv), stop)


def _train(config: RunConfig, stop: StopRequest) -> int:
    from trainer import distributed, heartbeat, run_folder
    from trainer.process import keep_freed_memory, set_threads

    world = distributed.world_from_environment()
    set_threads(config.parallel.threads or int(config.parallel.reproducible))
    keep_freed_memory()
    heartbeat.count_collectives()
    from trainer.engine import choose_device
    from trainer.preemption import Interrupted
    from trainer.step import NonFiniteLoss
    from trainer.train_loop import REQUEUE, Training

    run = run_folder.folder_of(config)
    try:
        distributed.start(choose_device(config.parallel.device), config.parallel.timeout_s, lambda: stop.requested)
    except Interrupted:
        return REQUEUE
    attempt = distributed.from_main(run_folder.attempt_of(run))
    _prepare_folder(run, config, attempt, is_main=world.rank == 0)
    for phase in ("load", "data", "evaluate") if _reads_remotely(config) else ():
        heartbeat.mine().allow(phase, config.data.remote.deadline_s)  # so long a server that does not answer is waited for
    heartbeat.mine().phase("load")
    training = Training(config, world, run, attempt, stop)
    try:
        return training.run_to_end()
    except NonFiniteLoss as error:
        training.observer.non_finite()
        saved = f"step {training.good_step}" if training.good_step >= 0 else "none"
        raise NonFiniteLoss(f"{error}; last good checkpoint: {saved}") from None
    except Exception as error:
        if training.saver.in_flight is not None:  # it may take a minute, in which nobody would know why
            training.observer.console.note(f"ending on {error}; first the checkpoint of step {training.saver.in_flight}")
        raise
    finally:
        training.close()


def _reads_remotely(config: RunConfig) -> bool:
    from data_pipeline.remote.address import is_remote

    return any(map(is_remote, [config.data.root, *(part.root for part in config.data.mixture)]))


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


if __name__ == "__main__":
    from trainer.process import run_as_rank

    run_as_rank(main)
