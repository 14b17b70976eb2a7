"""A site's own defaults: the name of a file in configs/cluster in, the values of the launcher's flags out."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.flags import LaunchError, build_parser

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "cluster"
NOT_OF_A_SITE = ("help", "cluster", "command", "in_job", "dry_run", "script", "detach", "multirun")
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Defaults of flags: their names as they are written, without the leading dashes; text, a switch or a list of texts.

    `name` is a file's in configs/cluster, or a path that ends with .yaml. All values are read as text: 8:00:00 stays a time.
    Raises: LaunchError for a name without a file, a key that is no flag, or a value of the wrong kind.
    """
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(item.stem for item in folder.glob("*.yaml"))
        raise LaunchError(f"--cluster {name}; no such file {path}; there are {', '.join(known) or 'none'}{_near(name, known)}")
    flags = {_key(action): action for action in build_parser()._actions if action.dest not in NOT_OF_A_SITE}
    values = {}
    for written, value in _load(path).items():
        key = str(written).replace("_", "-")
        if key not in flags:
            raise LaunchError(f"{path}: key {written!r} is no flag of the launcher{_near(key, flags)}; --help lists them")
        values[key] = _value(flags[key], value, f"{path}: {written}")
    return values


def _key(action: argparse.Action) -> str:
    return action.option_strings[-1].removeprefix("--")


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _load(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LaunchError(f"{path} cannot be read: {' '.join(str(error).split())}; it must be YAML of flags and values") from None
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise LaunchError(f"{path} holds no keys; lines `flag: value` are needed; see {FOLDER / 'example.yaml'}")
    return content


def _value(action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(action, argparse._StoreTrueAction):
        if value not in SWITCH:
            raise LaunchError(f"{where} = {value!r}; --{_key(action)} is on or off; write true or false")
        return SWITCH[value]
    if isinstance(action, argparse._AppendAction):
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in values):
            raise LaunchError(f"{where} = {value!r}; a list of texts is needed; write one per line with a dash before it")
        return values
    if not isinstance(value, str):
        raise LaunchError(f"{where} = {value!r}; --{_key(action)} takes one value; write it on the same line")
    try:
        if action.type is not None:
            action.type(value)  # type: ignore[operator]
    except ValueError:
        raise LaunchError(f"{where} = {value!r}; --{_key(action)} takes a number; mend the file") from None
    return value
