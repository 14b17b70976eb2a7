"""The run folder: one place for everything of a run, the same for every attempt. No torch import here."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.errors import ConfigError
from data_pipeline.files import write_atomically
from data_pipeline.remote.address import without_secrets
from trainer.config import RunConfig

FIXED = ("seed", "data", "model", "objective", "optim")  # what a run may not change under way
# The index's hash guards the stream, whichever way its shards come.
FREE = {"data.root", "data.remote", "data.read_threads", "data.prefetch_steps", "data.max_skip_fraction"}
# The checkpoint's fingerprint guards the extractor, wherever its weights lie.
FREE |= {"data.online.weights", "data.online.batch_frames"}
PACKAGES = ("torch", "deepspeed", "webdataset", "ray", "submitit", "hydra-core", "xformers", "prometheus-client", "numpy")


def folder_of(config: RunConfig) -> Path:
    """SLOTSTREAM_RUN_DIR as the launcher set it, else <runs>/<name>."""
    return Path(os.environ.get("SLOTSTREAM_RUN_DIR") or Path(config.runs) / config.name).absolute()


def attempt_of(run: Path) -> int:
    """SLOTSTREAM_ATTEMPT as the launcher set it, else the next free number."""
    if "SLOTSTREAM_ATTEMPT" in os.environ:
        return int(os.environ["SLOTSTREAM_ATTEMPT"])
    taken = [int(path.name) for path in (run / "attempts").glob("*") if path.name.isdigit()]
    return max(taken, default=0) + 1


def prepare(run: Path, config: RunConfig, attempt: int) -> None:
    """Make the folder; write config.yaml and provenance.json, without the secrets that URLs may carry. Rank 0 alone calls it.

    Raises ConfigError when the folder holds a run with other settings that has a checkpoint already.
    """
    (run / "attempts" / str(attempt)).mkdir(parents=True, exist_ok=True)
    if (run / "config.yaml").is_file() and any((run / "checkpoints").glob("step_*")):
        _refuse_other_settings(run, config)
    text = without_secrets(OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_atomically(run / "config.yaml", text)
    record = _provenance(config, attempt)
    write_atomically(run / "attempts" / str(attempt) / "provenance.json", json.dumps(record, indent=1))
    if not (run / "provenance.json").is_file():
        write_atomically(run / "provenance.json", json.dumps(record, indent=1))


def read_config(run: Path) -> RunConfig:
    """The configuration that a run folder was made with."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run={run}; there is no config.yaml in it; give a run folder, for example run=runs/demo")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}; it must be what the trainer wrote; restore it") from None


def _refuse_other_settings(run: Path, config: RunConfig) -> None:
    before, now = _fixed(read_config(run)), _fixed(config)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            text = (
                f"{key}={now.get(key)}, but run {run} was begun with {before.get(key)} and has checkpoints; "
                "a run goes on with its settings; choose another name=..., or set the old value"
            )
            raise ConfigError(without_secrets(text))


def _fixed(config: RunConfig) -> dict[str, Any]:
    """The settings that a run may not change. Of a dataset of the mixture the root is as free as data.root."""
    tree = asdict(config)
    for part in tree["data"]["mixture"]:
        del part["root"]
    return {key: value for key, value in _flat(tree).items() if key.split(".")[0] in FIXED and not _is_free(key)}


def _is_free(key: str) -> bool:
    return key in FREE or key.rpartition(".")[0] in FREE


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _provenance(config: RunConfig, attempt: int) -> dict[str, Any]:
    return {
        "command": [Path(sys.argv[0]).name, *map(without_secrets, sys.argv[1:])],
        "attempt": attempt,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seed": config.seed,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _git(*arguments: str) -> str | None:
    try:
        where = Path(__file__).resolve().parent
        result = subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
