"""Writing a checkpoint: a snapshot in memory goes in, a folder that is there whole or not at all comes out. One process alone.

Everything goes to a folder of another name, is hashed while it is written, lies on the disk (fsync) before the manifest is
written, and takes its name by a rename. The bytes are written once and never read again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import StateError
from data_pipeline.files import sync, write_atomically
from trainer.snapshot import HostTensors, Snapshot
from trainer.state import TrainState

FORMAT = "slotstream-checkpoint/1"
HINT = "newest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
BLOCK = 1 << 23  # bytes written and hashed at a time, both without Python's lock
SYNC_EVERY = 1 << 25  # bytes; a whole file at the end would be minutes on a slow disk in which nothing seems to move
SMALL_FILES = 1 << 20  # more than what state, manifest, hint and folders need on any file system


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that lies on the disk."""

    path: Path
    num_bytes: int


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def publish(
    root: Path,
    snapshot: Snapshot,
    state: TrainState,
    probe: Callable[[Mapping[str, torch.Tensor]], dict[str, float]] | None = None,
    fence: Callable[[], None] = lambda: None,
    moved: Callable[[], None] = lambda: None,
) -> Saved:
    """Write and name a checkpoint. `probe` gives the losses that are kept beside it; `fence` raises when this process may not
    publish any more, and is asked before anything is touched and at the last moment; `moved` is called whenever more of it
    lies on the disk.

    Raises OSError when it cannot be written, StateError when its weights are not finite or the fence says no: nothing of it is
    left then, and what was there before is untouched.
    """
    weights = snapshot.weights
    _require_finite(weights)
    losses = probe(weights.tensors) if probe is not None else {}
    if not all(map(math.isfinite, losses.values())):
        raise StateError("weights give outputs that are not finite; lower optim.lr")
    moved()
    fence()  # what looks stale below may be the new owner's
    root.mkdir(parents=True, exist_ok=True)
    for stale in (*root.glob(".writing_*"), *root.glob(".removing_*")):
        shutil.rmtree(stale, ignore_errors=True)
    for stale in root.glob(f".{HINT}.*.tmp"):
        stale.unlink(missing_ok=True)
    _require_space(root, snapshot.num_bytes + SMALL_FILES)
    folder = root / f".writing_{folder_name(state.step)}_{os.getpid()}"
    target = root / folder_name(state.step)
    try:
        folder.mkdir()
        content = {"train": state.to_json(), "probe": losses}
        files = {
            "model.safetensors": write_tensors(folder / "model.safetensors", weights, moved),
            "optimizer.safetensors": write_tensors(folder / "optimizer.safetensors", snapshot.moments, moved),
            "state.json": _write(folder / "state.json", [json.dumps(content, indent=1).encode()]),
        }
        manifest = {"format": FORMAT, "step": state.step, "files": files}
        _write(folder / "manifest.json", [json.dumps(manifest, indent=1).encode()])
        sync(folder)
        fence()
        if target.exists() or target.is_symlink():
            _set_aside(target)
        folder.rename(target)
        sync(root)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    write_atomically(root / HINT, json.dumps({"step": state.step, "folder": target.name}))
    return Saved(path=target, num_bytes=sum(entry["bytes"] for entry in files.values()))


def write_tensors(path: Path, tensors: HostTensors, moved: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write a safetensors file; its entry in the manifest. `moved`: see `publish`."""
    content = tensors.content()
    parts = (content[begin : begin + BLOCK] for begin in range(0, len(content), BLOCK))
    return _write(path, (part for group in ((tensors.header,), parts) for part in group), moved)


def _write(path: Path, parts: Iterable[bytes | memoryview], moved: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write a file, hash what is written on the way, return when it lies on the disk."""
    digest, size, synced = hashlib.sha256(), 0, 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
            if size - synced >= SYNC_EVERY:
                file.flush()
                os.fdatasync(file.fileno())
                synced = size
                moved()
        file.flush()
        os.fsync(file.fileno())
    moved()
    return {"bytes": size, "sha256": digest.hexdigest()}


def _require_finite(weights: HostTensors) -> None:
    if weights.memory.numel() and all(bool(torch.isfinite(value)) for value in weights.memory.aminmax()):
        return
    bad = [name for name, value in weights.tensors.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise StateError(f"weights are not finite ({bad[0]} and {len(bad) - 1} more tensors); lower optim.lr")


def _require_space(root: Path, needed: int) -> None:
    """The checkpoints that are there stay until the new one has proved itself, so that all of it must be free."""
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(f"{free / 2**20:.0f} MiB are free in {root}, the checkpoint needs {math.ceil(needed / 2**20)} MiB")


def _set_aside(target: Path) -> None:
    """Something of that name is there: move it, never overwrite it (a damaged folder that a resume passed over)."""
    number = 1
    while (aside := target.with_name(f"{target.name}.set_aside_{number}")).exists():
        number += 1
    target.rename(aside)
