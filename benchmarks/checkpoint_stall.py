"""How long a checkpoint holds up training: in the background against waiting for the disk. One run, the two ways in turns.

python -m benchmarks.checkpoint_stall [--ranks 2] [--stage 1] [--millions 20] [--saves 6] [--steps 8] [--folder FOLDER]

Starts its ranks (gloo, a thread each), trains a model of the asked size with cheap updates, saves with fsync under FOLDER (a
real disk: not /dev/shm), and prints what the training loop waited for each save, and the time of updates near and far from one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ASKED = 0.2  # background stall over the stall of waiting


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--millions", type=float, default=20, help="weights of the model")
    parser.add_argument("--saves", type=int, default=6, help="of each way")
    parser.add_argument("--steps", type=int, default=8, help="updates between two saves")
    parser.add_argument("--folder", default=None, help="where checkpoints go; default: a temporary folder of this directory")
    options = parser.parse_args(argv)
    if "RANK" in os.environ:
        result = _rank(options)
        if os.environ["RANK"] == "0":
            print(json.dumps(result), flush=True)
        os._exit(0)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_stall_", dir=options.folder or "."))
    try:
        return _report(_run_ranks(options, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_ranks(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "benchmarks.checkpoint_stall", "--folder", str(folder)]
    for name in ("ranks", "stage", "millions", "saves", "steps"):
        words += [f"--{name}", str(getattr(options, name))]
    processes = []
    for rank in range(options.ranks):
        own = {"RANK": rank, "WORLD_SIZE": options.ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": options.ranks}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        processes.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
    told = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a rank failed; see above")
    return json.loads(told[0].strip().splitlines()[-1])


def _rank(options: argparse.Namespace) -> dict[str, Any]:
    """Train and save in turns: background, waiting, background, ...; seconds of stalls and updates by way."""
    import torch

    from data_pipeline.order import Position
    from trainer import distributed
    from trainer.checkpoint_saver import Saver
    from trainer.config import CheckpointConfig, OptimConfig, ParallelConfig
    from trainer.engine import Engine
    from trainer.model.network import VideoSlotModel
    from trainer.probe import Probe
    from trainer.process import keep_freed_memory
    from trainer.state import TrainState

    keep_freed_memory()
    config = _model_of(options.millions)
    distributed.start(torch.device("cpu"), 300)
    torch.manual_seed(0)
    engine = Engine(VideoSlotModel(config), OptimConfig(), ParallelConfig(zero_stage=options.stage), torch.device("cpu"))
    features = torch.randn(1, 1, config.grid[0] * config.grid[1], config.feature_dim)
    stalls: dict[str, list[float]] = {"background": [], "waiting": []}
    updates: dict[str, list[float]] = {"none": [], "background": [], "waiting": []}
    savers = {
        way: Saver(Path(options.folder) / way, CheckpointConfig(keep=2, asynchronous=way == "background"), engine, _Quiet(),
                   probe=Probe(config, 0))
        for way in stalls
    }  # fmt: skip
    step, written = 0, 0
    for number in range(2 * options.saves + 2):
        way = "background" if number % 2 else "waiting"
        saver = savers[way]
        for place in range(2 * options.steps):  # the first half with a save, the second, once it is written, without
            if place == options.steps:
                saver._settle(give_up=True)
                saver.prove()
                if distributed.is_main():
                    saver._writer.submit(lambda: None).result()
                distributed.barrier()
            began = time.perf_counter()
            output = engine.forward(features)
            engine.backward((output.reconstruction - output.target).square().mean())
            engine.step(1e-4)
            step += 1
            news = distributed.all_sum(torch.tensor([float(saver.has_news())]))  # what every update's exchange carries along
            saver.stepped(step, bool(news.item()))
            took = time.perf_counter() - began
            if place == 0:
                began = time.perf_counter()
                saver.save(TrainState(step, Position(dataset_version="", seed=0, global_batch=1, position=step)))
                if number > 1:  # the first of each way makes the buffers
                    stalls[way].append(time.perf_counter() - began)
            elif number > 1:
                updates[way if place < options.steps else "none"].append(took)
    written = max((path.stat().st_size for path in Path(options.folder).rglob("*.safetensors")), default=0)
    return {"stalls": stalls, "updates": updates, "millions": sum(p.numel() for p in engine.module.parameters()) / 1e6
            if options.stage < 3 else options.millions, "largest_file_mb": written / 1e6, "ranks": options.ranks,
            "stage": options.stage}  # fmt: skip


def _model_of(millions: float) -> Any:
    """A small picture and a wide decoder: many weights, cheap updates."""
    from trainer.config import ModelConfig

    width = int((millions * 1e6 / 2) ** 0.5)
    return ModelConfig(num_slots=2, slot_dim=64, feature_dim=64, grid=[2, 2], decoder_hidden=[width, width, width])


class _Quiet:
    def saved(self, step: int, num_bytes: int, seconds: float, stall_s: float) -> None: ...
    def save_failed(self, step: int, why: str, in_a_row: int) -> None:
        print(why, file=sys.stderr)

    def verify_failed(self, text: str) -> None: ...


def _report(found: dict[str, Any]) -> int:
    print(f"{found['millions']:.1f} M weights, {found['ranks']} rank(s), ZeRO-{found['stage']}, fsync to disk")
    for way, name in (("waiting", "waiting for the disk"), ("background", "in the background")):
        values = found["stalls"][way]
        shown = ", ".join(f"{1e3 * value:.0f}" for value in values)
        print(f"  stall of a save, {name:22s} median {1e3 * statistics.median(values):7.1f} ms   ({shown})")
    ratio = statistics.median(found["stalls"]["background"]) / statistics.median(found["stalls"]["waiting"])
    print(f"  background / waiting {ratio:.3f}   asked <= {ASKED}: {'yes' if ratio <= ASKED else 'NO'}")
    for way, name in (("none", "no save near"), ("background", "background write"), ("waiting", "after waiting")):
        values = sorted(found["updates"][way])
        high = values[min(len(values) - 1, int(0.99 * len(values)))]
        print(
            f"  an update, {name:20s} p50 {1e3 * statistics.median(values):7.1f} ms   p99 {1e3 * high:7.1f} ms   n={len(values)}"
        )
    return 0 if ratio <= ASKED else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
