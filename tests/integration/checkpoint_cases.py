"""Checkpoints on real ranks, many cases in one process that forks its ranks. Each part prints one JSON line a case.

python -m tests.integration.checkpoint_cases matrix FOLDER [few]   save on some ranks and a ZeRO stage, go on with others
python -m tests.integration.checkpoint_cases damage FOLDER [few]   damage the newest, look which one all ranks load
python -m tests.integration.checkpoint_cases killed FOLDER [few]   kill -9 at every moment of a background write
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  # imported once, before the forks
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.errors import StateError
from data_pipeline.order import Position, World, rank_slice
from tests.integration.forked import run_forked
from tests.integration.ranks import free_port, rank_environment
from tests.integration.steps_worker import GRID, WIDTH, batch_of
from trainer import checkpoint, distributed
from trainer.config import (
    CheckpointConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    SlotContrastConfig,
    SSyncConfig,
)
from trainer.engine import MOMENTS, Engine
from trainer.model.network import VideoSlotModel
from trainer.objective import Objective
from trainer.probe import Probe
from trainer.state import TrainState
from trainer.step import train_step

CPU = torch.device("cpu")
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])  # imports the rest of torch, once for all ranks
CLIPS = 6  # of a global batch
BEFORE, AFTER = 2, 3  # updates before the checkpoint and after it
MODEL = ModelConfig(num_slots=4, slot_dim=8, feature_dim=WIDTH, grid=list(GRID), predictor_heads=2, decoder_hidden=[12, 12])
# eps well above rounding: with 1e-8 Adam turns a gradient that is zero but for rounding into a full step of either sign
OPTIM = OptimConfig(lr=1e-2, max_steps=10, warmup_steps=1, decay_steps=10, clip_norm=0.05, eps=1e-4)
PAIRS = ((2, 1), (2, 3), (3, 2), (1, 4), (8, 5))
FEW = ((2, 1, 1, 3), (2, 3, 1, 2), (3, 2, 3, 1), (1, 4, 2, 3))  # ranks, ranks, stage, stage


def start(stage: int, root: Path | None = None) -> tuple[Engine, checkpoint.Checkpoint | None]:
    """An engine, new or from the newest checkpoint under `root`, the way the trainer does it."""
    distributed.start(CPU, 60)
    found = checkpoint.load_newest(root, print, Probe(MODEL, 0)) if root is not None else None
    torch.manual_seed(5)
    model = VideoSlotModel(MODEL)
    if found is not None:
        checkpoint.load_weights(model, found)
    parallel = ParallelConfig(zero_stage=stage, device="cpu")
    example = torch.zeros(1, 2, GRID[0] * GRID[1], WIDTH)
    return Engine(model, OPTIM, parallel, CPU, adam=found.adam if found else None, example=example), found


def train(engine: Engine, first: int, count: int) -> list[float]:
    """Losses of updates `first`, `first` + 1, ..."""
    world = distributed.world_from_environment()
    shares = [rank_slice(CLIPS, World(rank=rank, size=world.size)) for rank in range(world.size)]
    objective = Objective(ObjectiveConfig(slot_contrast=SlotContrastConfig(), ssync=SSyncConfig(start_fraction=0.1)), 10)
    losses = []
    for step in range(first, first + count):
        batch = batch_of(step, world, CLIPS, 1, 3, None)
        losses.append(train_step(engine, objective, batch, [stop - start for start, stop in shares], step, 1e-2).total)
    return losses


def state(step: int) -> TrainState:
    return TrainState(step=step, position=Position(dataset_version="abc", seed=1, global_batch=CLIPS, position=CLIPS * step))


# -- the matrix -------------------------------------------------------------------------------------------------------------


def save_and_go_on(root: str, stage: int) -> list[float]:
    engine, _ = start(stage)
    train(engine, 0, BEFORE)
    save(engine, Path(root), BEFORE)
    return train(engine, BEFORE, AFTER)


def save(engine: Engine, root: Path, step: int) -> None:
    """As the training loop does: in the background, with a probe."""
    from trainer.checkpoint_saver import Saver

    saver = Saver(root, CheckpointConfig(), engine, Quiet(), probe=Probe(MODEL, 0))
    saver.save(state(step), final=True)
    saver.close()


class Quiet:
    def saved(self, step: int, num_bytes: int, seconds: float, stall_s: float) -> None: ...
    def save_failed(self, step: int, why: str, in_a_row: int) -> None: ...
    def verify_failed(self, text: str) -> None: ...


def resume(root: str, stage: int) -> list[float]:
    engine, found = start(stage, Path(root))
    assert found is not None and found.state == state(BEFORE)
    return train(engine, BEFORE, AFTER)


def matrix(folder: Path, few: bool) -> None:
    """One line a case: ranks and stage before and after, losses after the checkpoint, largest relative difference."""
    cases = [(old, new, stage, stage) for old, new in PAIRS for stage in (1, 2, 3)]
    cases += [(old, new, stage, stage % 3 + 1) for old, new in PAIRS for stage in (1, 2, 3)]
    unchanged: dict[tuple[int, int], list[float]] = {}
    for old, new, stage, then in FEW if few else cases:
        name = f"{old}_ranks_stage{stage}"
        root = str(folder / name)
        if (old, stage) not in unchanged:
            results = run_forked(old, folder / f"{name}_work", save_and_go_on, root, stage)
            assert all(losses == results[0] for losses in results)
            unchanged[old, stage] = results[0]
        results = run_forked(new, folder / f"{name}_to_{new}_stage{then}", resume, root, then)
        pairs = [pair for losses in results for pair in zip(losses, unchanged[old, stage], strict=True)]
        worst = max(abs(one - other) / abs(other) for one, other in pairs)
        told = {"ranks": [old, new], "stages": [stage, then], "losses": unchanged[old, stage], "difference": worst}
        print(json.dumps(told), flush=True)


# -- damage -----------------------------------------------------------------------------------------------------------------

NEWEST, OLDER = 30, 20


def _truncate(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _flip(file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    place = content.rindex(b'"sha256": "') + 12 if file.name == "manifest.json" else len(content) // 2
    content[place] ^= 1
    file.write_bytes(bytes(content))


def _delete(file: Path, other: Path) -> None:
    file.unlink()


def _empty(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def _swap(file: Path, other: Path) -> None:
    shutil.copyfile(other, file)


def _be_folder(file: Path, other: Path) -> None:
    file.unlink()
    file.mkdir()


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
HARM: dict[str, Callable[[Path, Path], None]] = {
    "truncated": _truncate, "flipped": _flip, "deleted": _delete, "emptied": _empty, "swapped": _swap, "folder": _be_folder,
}  # fmt: skip


def _all_files_of_another_step(newest: Path, older: Path) -> None:
    for file in older.iterdir():
        shutil.copyfile(file, newest / file.name)


def _not_a_folder(newest: Path, older: Path) -> None:
    shutil.rmtree(newest)
    newest.write_text("not a folder")


def _a_link_to_nowhere(newest: Path, older: Path) -> None:
    shutil.rmtree(newest)
    newest.symlink_to(newest.parent / "nowhere")


def _other_weights_with_hashes_that_fit(newest: Path, older: Path) -> None:
    tensors = load_file(newest / "model.safetensors")
    tensors["decoder.bias_0"] = tensors["decoder.bias_0"] + 0.01
    save_file(tensors, newest / "model.safetensors")
    manifest = json.loads((newest / "manifest.json").read_text())
    content = (newest / "model.safetensors").read_bytes()
    manifest["files"]["model.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest))


WHOLE = {
    "all files of another step": _all_files_of_another_step,
    "not a folder": _not_a_folder,
    "a link to nowhere": _a_link_to_nowhere,
    "other weights, hashes that fit": _other_weights_with_hashes_that_fit,
}
SEEN_BY_ONE = "damaged as rank 1 alone sees it"
EVERYTHING = "every checkpoint damaged"


def damages() -> list[str]:
    return [f"{file} {harm}" for file in FILES for harm in HARM] + [*WHOLE, SEEN_BY_ONE, EVERYTHING]


def do_damage(root: Path, name: str) -> None:
    newest, older = (root / checkpoint.folder_name(step) for step in (NEWEST, OLDER))
    if name in WHOLE:
        WHOLE[name](newest, older)
    elif name == EVERYTHING:
        for path in checkpoint.candidates(root):
            _truncate(path / "model.safetensors", path)
    elif name != SEEN_BY_ONE:
        file, _, harm = name.partition(" ")
        HARM[harm](newest / file, older / file)


def train_and_save(root: str, stage: int) -> None:
    engine, _ = start(stage)
    for number, step in enumerate((10, OLDER, NEWEST)):
        train(engine, number, 1)
        save(engine, Path(root), step)


def load_all(roots: list[str], names: list[str], stage: int) -> list[Any]:
    """Which step each case gives this rank, with a digest of all its tensors, or the error; at the end an engine from one."""
    distributed.start(CPU, 60)
    found = [_load(Path(root), name) for root, name in zip(roots, names, strict=True)]
    engine, _ = start(stage, Path(roots[0]))
    weights = engine.weights()
    return [*found, _digest(weights)]


def _load(root: Path, name: str) -> Any:
    real, said = checkpoint._verifying, []
    if name == SEEN_BY_ONE and distributed.world_from_environment().rank == 1:
        checkpoint._verifying = _blind_to_newest(real)  # type: ignore[assignment]
    try:
        loaded = checkpoint.load_newest(root, said.append, Probe(MODEL, 0))
        assert loaded is not None
        both = {f"{key}/{name}": value for key in MOMENTS for name, value in getattr(loaded.adam, key).items()}
        return [loaded.state.step, _digest({**loaded.weights, **both}), _digest(loaded.weights), said]
    except StateError as error:
        return [-1, str(error), "", said]
    finally:
        checkpoint._verifying = real


def _blind_to_newest(real: Callable[..., Any]) -> Callable[..., Any]:
    def verifying(path: Path, entry: Any) -> Any:
        if path.parent.name == checkpoint.folder_name(NEWEST) and path.name == "optimizer.safetensors":
            raise StateError("optimizer.safetensors cannot be read (Stale file handle)")
        return real(path, entry)

    return verifying


def _digest(tensors: Any) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return state.hexdigest()


def _tree(root: Path) -> str:
    names = sorted(root.rglob("*"))
    return hashlib.sha256(repr([(str(p), p.read_bytes() if p.is_file() else b"") for p in names]).encode()).hexdigest()


def damage(folder: Path, few: bool) -> None:
    """One line a case: stage, damage, what each rank loaded, whether all that was there is still there as it was."""
    for stage in (1, 2, 3):
        whole = folder / f"stage{stage}"
        run_forked(2, folder / f"work{stage}", train_and_save, str(whole), stage)
        names = damages()[:: 1 if stage == 1 or not few else 4] + ([EVERYTHING] if few and stage > 1 else [])
        roots = [folder / f"stage{stage}_case{number}" for number in range(len(names))]
        for root, name in zip(roots, names, strict=True):
            shutil.copytree(whole, root)
            do_damage(root, name)
        before = [_tree(root) for root in roots]
        results = run_forked(2, folder / f"load{stage}", load_all, [str(root) for root in roots], names, stage)
        shutil.copytree(whole, folder / f"older{stage}")
        shutil.rmtree(folder / f"older{stage}" / checkpoint.folder_name(NEWEST))
        ((step, right, weights, _),) = [run_forked(1, folder / f"right{stage}", load_one, str(folder / f"older{stage}"))[0]]
        assert step == OLDER
        for number, name in enumerate(names):
            loaded = [result[number] for result in results]
            told: dict[str, Any] = {"stage": stage, "damage": name, "loaded": [entry[0] for entry in loaded]}
            told["same"] = all(entry[1] == loaded[0][1] for entry in loaded)
            told["right"] = loaded[0][1] == right
            told["said"] = loaded[0][3] or [loaded[0][1]]
            told["untouched"] = _tree(roots[number]) == before[number]
            print(json.dumps(told), flush=True)
        engines = [result[-1] == weights for result in results]
        print(json.dumps({"stage": stage, "engine_holds_what_was_loaded": all(engines)}), flush=True)


def load_one(root: str) -> Any:
    distributed.start(CPU, 60)
    return _load(Path(root), "")


# -- kill -9 ----------------------------------------------------------------------------------------------------------------

MOMENTS_OF_A_WRITE = 8  # weights, moments, state, manifest, folder; after the rename: its parent, hint, hint's folder
PUBLISHED = 6  # from this one on the new checkpoint has its name


def hang_in_write(root: str, moment: int, ready: str) -> None:
    """Save step 10; then step 20, whose writer hangs where it is about to sync for the `moment`-th time. Training goes on."""
    from trainer.checkpoint_saver import Saver

    engine, _ = start(1)
    train(engine, 0, 1)
    saver = Saver(Path(root), CheckpointConfig(), engine, Quiet(), probe=Probe(MODEL, 0))
    saver.save(state(10), final=True)
    real, calls, reached = os.fsync, itertools.count(1), threading.Event()

    def fsync(descriptor: int) -> None:
        if next(calls) == moment:
            reached.set()
            time.sleep(3600)
        real(descriptor)

    os.fsync = fsync
    saver.save(state(20))
    reached.wait(120)
    train(engine, 1, 2)
    Path(ready).touch()
    time.sleep(3600)


def killed(folder: Path, few: bool) -> None:
    """One line a moment of the write at which the process was killed: which step is loaded then, what lies there after one more
    save."""
    for moment in range(1, MOMENTS_OF_A_WRITE + 1, 2 if few else 1):
        root, ready = folder / f"killed{moment}", folder / f"ready{moment}"
        folder.mkdir(exist_ok=True)
        child = os.fork()
        if child == 0:
            try:
                os.environ.update(rank_environment(0, 1, free_port()))
                hang_in_write(str(root), moment, str(ready))
            finally:
                os._exit(1)
        while not ready.exists() and os.waitpid(child, os.WNOHANG)[0] == 0:
            time.sleep(0.01)
        assert ready.exists(), "the rank ended by itself"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded, names = run_forked(1, folder / f"after{moment}", load_and_save_again, str(root))[0]
        expected = 20 if moment >= PUBLISHED else 10
        print(json.dumps({"moment": moment, "loaded": loaded, "expected": expected, "names": names}), flush=True)


def load_and_save_again(root: str) -> Any:
    engine, found = start(1, Path(root))
    assert found is not None
    save(engine, Path(root), 30)
    return found.state.step, sorted(path.name for path in Path(root).iterdir())


if __name__ == "__main__":
    {"matrix": matrix, "damage": damage, "killed": killed}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:] == ["few"])
