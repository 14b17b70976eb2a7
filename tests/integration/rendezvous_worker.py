"""Ranks that try to meet, right ones and wrong ones. No arguments; a JSON object of what became of each goes to stdout.

Each rank is a fork of a process that has imported everything, so all scenes together cost one start.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_pipeline.compose import run_command
from tests.integration.ranks import free_port, rank_environment
from trainer import distributed
from trainer.preemption import Interrupted, StopRequest

PATIENCE_S = 60


class Rank(NamedTuple):
    pid: int
    log: Path

    def end(self) -> dict[str, Any]:
        """Exit code (minus the signal) and what it said. Killed once patience is over."""
        until = time.monotonic() + PATIENCE_S
        done, status = os.waitpid(self.pid, os.WNOHANG)
        while not done:
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.02)
            done, status = os.waitpid(self.pid, os.WNOHANG)
        return {"code": os.waitstatus_to_exitcode(status), "said": self.log.read_text()}

    def wait_for(self, word: str) -> Rank:
        until = time.monotonic() + PATIENCE_S
        while word not in self.log.read_text() and time.monotonic() < until:
            time.sleep(0.02)
        return self


def fork(folder: Path, rank: int, world: int, port: int, play: Callable[[], int], **environment: str) -> Rank:
    log = folder / f"{len(list(folder.iterdir()))}.log"
    log.touch()
    pid = os.fork()
    if pid:
        return Rank(pid, log)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the program, however that ends
    code = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        own = {"SLOTSTREAM_ATTEMPT": "2", "SLOTSTREAM_RUN_DIR": "/runs/mine"}
        os.environ.update(rank_environment(rank, world, port) | own | environment)
        code = run_command(lambda _: play())
    except SystemExit as request:
        code = int(request.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def meet(timeout_s: int = 30) -> Callable[[], int]:
    """What a rank of the trainer does: meet the others, add up a number."""

    def play() -> int:
        stop = StopRequest().install()
        print("began", flush=True)
        try:
            distributed.start(torch.device("cpu"), timeout_s, lambda: stop.requested)
        except Interrupted:
            return 75
        print("sum", distributed.all_sum(torch.ones(1)).item(), flush=True)
        return 0

    return play


def strangers(folder: Path) -> dict[str, Any]:
    """Two ranks of attempt 2; before the second comes, there come one of attempt 1, of another run, of another world."""
    port = free_port()
    first = fork(folder, 0, 2, port, meet())
    old = fork(folder, 1, 2, port, meet(), SLOTSTREAM_ATTEMPT="1").end()
    other_run = fork(folder, 1, 2, port, meet(), SLOTSTREAM_RUN_DIR="/runs/theirs").end()
    larger = fork(folder, 1, 4, port, meet()).end()
    second_first = fork(folder, 0, 2, port, meet()).end()
    right = fork(folder, 1, 2, port, meet(), GLOO_SOCKET_IFNAME="lo").end()
    names = {"old": old, "other_run": other_run, "larger": larger, "second_first": second_first, "right": right}
    return names | {"first": first.end()}


def stopped(folder: Path) -> dict[str, Any]:
    """One waits for rank 0, which never comes; two of three wait for the third."""
    alone = fork(folder, 1, 2, free_port(), meet()).wait_for("began")
    port = free_port()
    waiting = [fork(folder, rank, 3, port, meet()).wait_for("began") for rank in (0, 1)]
    time.sleep(0.3)
    os.kill(alone.pid, signal.SIGUSR2)
    os.kill(waiting[1].pid, signal.SIGTERM)
    return {"alone": alone.end(), "waiting": [rank.end() for rank in waiting]}


def wrong(folder: Path) -> dict[str, Any]:
    """Settings that cannot work, and ranks that do not come."""
    return {
        "name": fork(folder, 0, 2, free_port(), meet(), MASTER_ADDR="no-such-host.invalid").end(),
        "port": fork(folder, 0, 2, free_port(), meet(), MASTER_PORT="many").end(),
        "interface": fork(folder, 0, 2, free_port(), meet(), GLOO_SOCKET_IFNAME="nosuch0").end(),
        "no_first": fork(folder, 1, 2, free_port(), meet(1)).end(),
        "no_second": fork(folder, 0, 3, free_port(), meet(1)).end(),
    }


def frozen(folder: Path) -> dict[str, Any]:
    """A rank stops for good; the other asks for a collective in every group that DeepSpeed has made."""
    port = free_port()
    ranks = [fork(folder, rank, 2, port, _train_once) for rank in (0, 1)]
    outcome = ranks[0].end()
    os.kill(ranks[1].pid, signal.SIGKILL)
    ranks[1].end()
    return outcome


def _train_once() -> int:
    from torch.distributed import distributed_c10d

    from tests.integration.steps_worker import main

    main({"stage": 2, "accumulation": 1, "global_batch": 2, "steps": 1, "timeout_s": 3})
    distributed.barrier()
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    groups = list(distributed_c10d._world.pg_map)
    for group in groups:
        try:
            torch.distributed.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            print("gave up:", str(error).splitlines()[0], flush=True)
    print("groups", len(groups), flush=True)
    return 0


def blocked(folder: Path) -> list[dict[str, Any]]:
    """Rank 0 is asked to stop while it waits in a collective for rank 1, where no handler of Python's runs."""
    port, signalled = free_port(), folder / "signalled"
    ranks = [fork(folder, rank, 2, port, _block, SIGNALLED=str(signalled)) for rank in (0, 1)]
    ranks[0].wait_for("waits")
    time.sleep(0.3)
    os.kill(ranks[0].pid, signal.SIGUSR2)
    signalled.touch()
    return [rank.end() for rank in ranks]


def _block() -> int:
    stop = StopRequest().install()
    distributed.start(torch.device("cpu"), 30)
    if os.environ["RANK"] == "1":
        while not Path(os.environ["SIGNALLED"]).exists():
            time.sleep(0.02)
    print("waits", flush=True)
    distributed.all_sum(torch.ones(1))
    print("agreed to go on:", distributed.agree(not stop.requested), flush=True)
    return 0


def training(folder: Path) -> dict[str, Any]:
    """A run that is stopped as it loads, then within its fourth step, then as it loads again, each time by rank 1 alone."""
    from tests.integration.tiny_run import arguments, make_shards

    data, runs = make_shards(folder / "data"), folder / "runs"
    argv = arguments(data, runs, "run", "checkpoint.every_steps=100")[2:]
    found = {}
    for scene, moment in (("loading", -1), ("step", 3), ("loading_again", -1)):
        port = free_port()
        ranks = [fork(folder, rank, 2, port, lambda: _train(argv, moment), SLOTSTREAM_RUN_DIR="") for rank in (0, 1)]  # noqa: B023
        ended = [rank.end() for rank in ranks]
        files = sorted((runs / "run" / "checkpoints").glob("step_*/*"))
        found[scene] = {
            "ranks": ended,
            "checkpoints": sorted({path.parent.name for path in files}),
            "written": [path.stat().st_mtime_ns for path in files],
        }
    return found


def _train(argv: list[str], moment: int) -> int:
    """The trainer, where rank 1 gets a SIGTERM within step `moment`, or at the end of loading."""
    from trainer import main, train_loop

    load, step = train_loop.Training._begin, train_loop.train_step

    def loads(self: Any) -> None:
        load(self)
        if moment < 0 and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def steps(engine: Any, objective: Any, batch: Any, shares: Any, number: int, *more: Any) -> Any:
        if number == moment and os.environ["RANK"] == "1":
            backward = engine.backward

            def interrupted(loss: Any) -> None:
                os.kill(os.getpid(), signal.SIGTERM)
                backward(loss)

            engine.backward = interrupted
        return step(engine, objective, batch, shares, number, *more)

    train_loop.Training._begin, train_loop.train_step = loads, steps
    return main.main(argv)


def main() -> dict[str, Any]:
    torch.set_num_threads(1)
    for module in ("torch._dynamo", "deepspeed", "trainer.main", "trainer.train_loop", "tests.integration.steps_worker"):
        __import__(module)
    with tempfile.TemporaryDirectory() as folder:
        scenes = (strangers, stopped, wrong, frozen, blocked, training)
        return {scene.__name__: scene(Path(folder)) for scene in scenes}


if __name__ == "__main__":
    print(json.dumps(main()), flush=True)
