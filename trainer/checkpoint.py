"""Checkpoints: written whole or not at all, every file hashed, chosen by a vote of all ranks, nothing unpickled.

checkpoints/step_00001000/{model.safetensors, optimizer.safetensors, state.json, manifest.json}. The manifest holds the sha256
of the others; a folder without one that verifies is damaged: it is reported, passed over, and never overwritten. This module
finds, reads and retires them; checkpoint_write.py writes one, checkpoint_saver.py says when.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data_pipeline.errors import ConfigError, StateError
from trainer import distributed
from trainer.checkpoint_write import FILES, FORMAT, Saved, folder_name, publish
from trainer.engine import MOMENTS, AdamState, Engine
from trainer.probe import difference, require_same_shapes
from trainer.snapshot import HostTensors, SnapshotTaker
from trainer.state import TrainState

__all__ = ["Checkpoint", "candidates", "folder_name", "load_newest", "load_weights", "problem", "read", "retire", "save"]

BLOCK = 1 << 23
ProbeOf = Callable[[Mapping[str, Tensor]], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint in memory. `probe`: losses that its weights gave when it was written."""

    path: Path
    state: TrainState
    weights: Mapping[str, Tensor]
    adam: AdamState
    probe: Mapping[str, float]


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, newest first, verified or not."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if re.fullmatch(r"step_\d{8}", path.name)), reverse=True)


def problem(path: Path) -> str:
    """Why a checkpoint folder does not verify; "" when it does. Reads every byte."""
    try:
        for name, entry in _manifest(path).items():
            with _verifying(path / name, entry) as fill:
                block = memoryview(bytearray(min(BLOCK, entry["bytes"])))
                for begin in range(0, entry["bytes"], BLOCK):
                    fill(block[: entry["bytes"] - begin])
        return ""
    except StateError as error:
        return str(error)


def read(path: Path) -> Checkpoint:
    """Read a checkpoint. What is read is what was verified: every file is hashed as it comes into memory, once, and to stay: 12
    bytes for each number of the model.

    Raises StateError, without the folder's name, when it does not verify.
    """
    entries = _manifest(path)
    try:
        with _verifying(path / "state.json", entries["state.json"]) as fill:
            text = bytearray(entries["state.json"]["bytes"])
            fill(memoryview(text))
        stored = json.loads(text)
        state = TrainState.from_json(stored["train"])
        weights = _read_tensors(path / "model.safetensors", entries["model.safetensors"])
        moments = _read_tensors(path / "optimizer.safetensors", entries["optimizer.safetensors"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StateError(f"hashes verify but its content cannot be read ({type(error).__name__}: {error})") from None
    if folder_name(state.step) != path.name:
        raise StateError(f"it holds step {state.step}")
    parts = {
        key: {name[len(key) + 1 :]: value for name, value in moments.items() if name.startswith(key + "/")} for key in MOMENTS
    }
    adam = AdamState(parts["exp_avg"], parts["exp_avg_sq"], state.step)
    return Checkpoint(path=path, state=state, weights=weights, adam=adam, probe=stored.get("probe", {}))


def save(root: Path, engine: Engine, state: TrainState) -> Saved:
    """Write a checkpoint of an engine and wait for it. Collective. The training loop has a Saver instead.

    Raises StateError on every rank when rank 0 could not write or the weights are not finite; what was there before stays.
    """
    snapshot = SnapshotTaker(engine).take()
    outcome: Saved | str | None = None
    if snapshot is not None:
        try:
            outcome = publish(root, snapshot, state)
        except (OSError, StateError) as error:
            outcome = cannot_write(state.step, root, error)
    outcome = distributed.from_main(outcome)
    if not isinstance(outcome, Saved):
        raise StateError(str(outcome))
    return outcome


def cannot_write(step: int, root: Path, error: Exception) -> str:
    """One line about a checkpoint that could not be written."""
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.strerror} ({error.filename or root})"
    elif not isinstance(error, OSError | StateError):
        reason = f"{type(error).__name__}: {error}"
    return (
        f"checkpoint of step {step} could not be written: {reason}; "
        "older checkpoints are untouched; free space or mend the folder"
    )


def load_newest(root: Path, report: Callable[[str], None], probe: ProbeOf | None = None) -> Checkpoint | None:
    """The newest checkpoint that every rank could verify, and that gives the losses it was stored with where there is a
    `probe`; None when there is no candidate at all. Collective.

    Raises StateError when candidates exist and none verifies: starting again from nothing would hide the loss; ConfigError when
    the probe's model is not the checkpoint's.
    """
    refused = []
    for name in _names(root):
        found, reason = _attempt(root / name, probe)
        if distributed.agree(not reason) and found is not None:
            return found
        reason = next((text for text in distributed.gather_objects(reason) if text), "")
        refused.append(f"{name}: {reason}")
        report(f"checkpoint {root / name} does not verify: {reason}; trying an older one")
    if refused:
        raise StateError(
            f"none of {len(refused)} checkpoints in {root} verifies ({'; '.join(refused[:3])}); they are left as they are; "
            "restore one from a copy, or start under another name"
        )
    return None


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model of the same shapes.

    Raises ConfigError with the first tensor that differs.
    """
    require_same_shapes(model, checkpoint.weights, f"checkpoint {checkpoint.path}: ")
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
            if (path / "manifest.json").is_file():
                _remove(path)
        elif path == trusted or not (reason := problem(path)):
            good += 1
        else:
            report(f"checkpoint {path} does not verify: {reason}; it is kept and does not count")


def _remove(path: Path) -> None:
    """First out of sight: one that a kill leaves half removed would look damaged. A later save clears what is left."""
    hidden = path.with_name(f".removing_{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _names(root: Path) -> list[str]:
    """Rank 0's list of candidates on every rank. Collective."""
    found: list[str] | str = []
    if distributed.is_main():
        try:
            found = [path.name for path in candidates(root)]
        except OSError as error:
            found = f"{root} cannot be listed ({error.strerror}); mend the folder"
    found = distributed.from_main(found)
    if isinstance(found, str):
        raise StateError(found)
    return found


def _attempt(path: Path, probe: ProbeOf | None) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or why it is none, as this rank sees it. Does not raise but for a model of another shape."""
    try:
        found = read(path)
        different = difference(found.probe, probe(found.weights)) if probe is not None and found.probe else ""
        return (None, different) if different else (found, "")
    except ConfigError as error:
        raise ConfigError(f"checkpoint {path}: {error}") from None
    except StateError as error:
        return None, str(error)


def _manifest(path: Path) -> dict[str, Any]:
    """Entries of the files that make a checkpoint. Raises StateError."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise StateError(f"format {manifest['format']!r} is not {FORMAT!r}")
        if folder_name(int(manifest["step"])) != path.name:
            raise StateError(f"manifest.json is that of step {manifest['step']}")
        return {name: {"bytes": int(manifest["files"][name]["bytes"]), **manifest["files"][name]} for name in FILES}
    except FileNotFoundError:
        raise StateError("manifest.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StateError(f"manifest.json cannot be read ({type(error).__name__}: {error})") from None


def _read_tensors(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """A file's tensors, read to where they stay. Raises StateError when it does not verify, ValueError and others when it is
    not as checkpoint_write.py writes it."""
    with _verifying(path, entry) as fill:
        length = bytearray(8)
        fill(memoryview(length))
        size = int.from_bytes(length, "little")
        if 8 + size > entry["bytes"]:
            raise ValueError(f"a header of {size} bytes")
        text = bytearray(size)
        fill(memoryview(text))
        shapes = {name: item["shape"] for name, item in json.loads(text).items() if name != "__metadata__"}
        if 8 + size + 4 * sum(map(math.prod, shapes.values())) != entry["bytes"]:
            raise ValueError("shapes and size do not fit")
        made = HostTensors(shapes)
        if made.header != length + text:
            raise ValueError("its header is not that of float32 tensors in the order of their names")
        fill(made.content())
    return made.tensors


@contextlib.contextmanager
def _verifying(path: Path, entry: Mapping[str, Any]) -> Iterator[Callable[[memoryview], None]]:
    """Yields what fills a buffer with the file's next bytes. All must be read: at the end StateError is raised when they are not
    those of its entry."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise StateError(f"{path.name} has {size} bytes, the manifest says {entry['bytes']}")

            def fill(buffer: memoryview) -> None:
                done = 0
                while done < len(buffer):
                    count = file.readinto(buffer[done : done + BLOCK])
                    if not count:
                        raise StateError(f"{path.name} ended while it was read")
                    digest.update(buffer[done : done + count])
                    done += count

            yield fill
    except FileNotFoundError:
        raise StateError(f"{path.name} is missing") from None
    except OSError as error:
        raise StateError(f"{path.name} cannot be read ({error.strerror})") from None
    if digest.hexdigest() != entry.get("sha256"):
        raise StateError(f"{path.name} has another sha256 than the manifest says")
