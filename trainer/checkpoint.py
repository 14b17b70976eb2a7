"""Checkpoints: written whole or not at all, every file hashed, chosen by a vote of all ranks, nothing unpickled.

checkpoints/step_00001000/{model.safetensors, optimizer.safetensors, state.json, manifest.json}. The manifest holds the sha256
of the others; a folder without one that verifies is damaged: it is reported, passed over, and never overwritten.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.errors import ConfigError, StateError
from data_pipeline.files import sha256_of, sync, write_atomically
from trainer import distributed
from trainer.engine import MOMENTS, AdamState, Engine
from trainer.state import TrainState

FORMAT = "slotstream-checkpoint/1"
HINT = "newest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    path: Path
    state: TrainState
    weights: Mapping[str, Tensor]
    adam: AdamState


@dataclass(frozen=True, slots=True)
class Saved:
    path: Path
    num_bytes: int


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, newest first, verified or not."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if re.fullmatch(r"step_\d{8}", path.name)), reverse=True)


def problem(path: Path) -> str:
    """Why a checkpoint folder does not verify; "" when it does. Reads every byte."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']!r} is not {FORMAT!r}"
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}"
            if sha256_of(file) != entry["sha256"]:
                return f"{name} has another sha256 than the manifest says"
        return ""
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__}: {error})"


def save(root: Path, engine: Engine, state: TrainState) -> Saved:
    """Write a checkpoint. Collective: every rank gathers, rank 0 writes, all learn whether it worked.

    Raises StateError on every rank when rank 0 could not write or the weights are not finite; what was there before stays.
    """
    weights = engine.weights()
    adam = engine.adam_state(state.step)
    outcome: Any = None
    if torch.distributed.get_rank() == 0:
        try:
            outcome = _publish(root, weights, adam, state)
        except OSError as error:
            outcome = f"{error.strerror or error} ({error.filename or root})"
        except SafetensorError as error:  # what a full disk is to it
            outcome = f"{error} ({root})"
        except StateError as error:
            outcome = str(error)
    outcome = distributed.from_main(outcome)
    if isinstance(outcome, str):
        raise StateError(
            f"checkpoint of step {state.step} could not be written: {outcome}; "
            "older checkpoints are untouched; free space or mend the folder"
        )
    return outcome


def load_newest(root: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that every rank could verify; None when there is no candidate at all. Collective.

    Raises StateError when candidates exist and none verifies: starting again from nothing would hide the loss.
    """
    names = distributed.from_main([path.name for path in candidates(root)])
    refused = []
    for name in names:
        reason = problem(root / name)
        if distributed.agree(not reason):
            return read(root / name)
        reason = next((text for text in distributed.gather_objects(reason) if text), "")
        refused.append(f"{name}: {reason}")
        report(f"checkpoint {root / name} does not verify: {reason}; trying an older one")
    if refused:
        raise StateError(
            f"none of {len(refused)} checkpoints in {root} verifies ({'; '.join(refused[:3])}); they are left as they are; "
            "restore one from a copy, or start under another name"
        )
    return None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint that verified."""
    state = TrainState.from_json(json.loads((path / "state.json").read_text())["train"])
    try:
        weights = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
    except SafetensorError as error:
        raise StateError(
            f"{path}: hashes verify but the tensors cannot be read ({error}); it was written damaged; use an older one"
        ) from None
    parts = {
        key: {name[len(key) + 1 :]: value for name, value in moments.items() if name.startswith(key + "/")} for key in MOMENTS
    }
    return Checkpoint(path=path, state=state, weights=weights, adam=AdamState(parts["exp_avg"], parts["exp_avg_sq"], state.step))


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model of the same shapes.

    Raises ConfigError with the first tensor that differs.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | checkpoint.weights.keys()):
        here = list(own[name].shape) if name in own else "absent"
        there = list(checkpoint.weights[name].shape) if name in checkpoint.weights else "absent"
        if here != there:
            raise ConfigError(
                f"checkpoint {checkpoint.path}: tensor {name} is {there}, the configured model has {here}; "
                "a run goes on with the model it began with; undo the change to model=..., or choose another name"
            )
    model.load_state_dict(dict(checkpoint.weights))


def retire(root: Path, keep: int, trusted: Path, report: Callable[[str], None]) -> None:
    """Remove verified checkpoints beyond the newest `keep`. `trusted` was written and hashed lately.

    Called once the weights of `trusted` have given a finite loss, so that a run which blows up keeps an older one.
    A damaged folder neither counts nor is removed.
    """
    good = 0
    for path in candidates(root):
        if path > trusted:
            continue
        if good >= keep:
            if _has_manifest(path):
                shutil.rmtree(path)
        elif path == trusted or not problem(path):
            good += 1
        else:
            report(f"checkpoint {path} does not verify: {problem(path)}; it is kept and does not count")


def _has_manifest(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def _publish(root: Path, weights: Mapping[str, Tensor], adam: AdamState, state: TrainState) -> Saved:
    bad = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise StateError(f"weights are not finite ({bad[0]} and {len(bad) - 1} more tensors); lower optim.lr")
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(".writing_*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = root / f".writing_{folder_name(state.step)}_{os.getpid()}"
    folder.mkdir()
    try:
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
        moments = {f"{key}/{name}": value.contiguous() for key in MOMENTS for name, value in getattr(adam, key).items()}
        save_file(moments, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps({"train": state.to_json()}, indent=1))
        files = {name: _entry(folder / name) for name in ("model.safetensors", "optimizer.safetensors", "state.json")}
        manifest = {"format": FORMAT, "step": state.step, "files": files}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        sync(folder / "manifest.json")
        sync(folder)
        target = root / folder_name(state.step)
        if target.exists():
            _set_aside(target)
        folder.rename(target)
        sync(root)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    write_atomically(root / HINT, json.dumps({"step": state.step, "folder": target.name}))
    return Saved(path=target, num_bytes=sum(entry["bytes"] for entry in files.values()))


def _set_aside(target: Path) -> None:
    """Something of that name is there: move it, never overwrite it (a damaged folder that a resume passed over)."""
    for number in _count():
        aside = target.with_name(f"{target.name}.set_aside_{number}")
        if not aside.exists():
            target.rename(aside)
            return


def _count() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield number


def _entry(file: Path) -> dict[str, Any]:
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
