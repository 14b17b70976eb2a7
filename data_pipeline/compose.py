"""Compose a command's configuration: YAML groups and command-line overrides over typed, strict schemas.

One function for every command. Unknown keys and wrong types are refused with the full key and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.errors import ConfigError, DataError, StateError, StorageError, say_error

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
T = TypeVar("T")


def compose(
    config_name: str, schema: type[T], overrides: Sequence[str] = (), group_schemas: Mapping[str, type] | None = None
) -> T:
    """Build `schema` from configs/<config_name>.yaml and `overrides` ("optim.lr=1e-3", "experiment=ssync_movi_c").

    `group_schemas` maps "group/name" (used as "<name>" in a group file's defaults) to the dataclass of that member.
    Raises ConfigError: one line that names the key, the rule and the nearest valid name.
    """
    _refuse_additions(overrides)
    overrides = [_readable(override) for override in overrides]
    store = ConfigStore.instance()
    store.store(name=f"{config_name}_schema", node=schema)
    for path, node in (group_schemas or {}).items():
        group, _, name = path.rpartition("/")
        store.store(group=group, name=name, node=node)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = hydra_compose(config_name, list(overrides))
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{missing[0]} is not set; it has no default; add {missing[0]}=... to the command")
        return OmegaConf.to_object(config)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, schema, overrides)) from None


def _refuse_additions(overrides: Sequence[str]) -> None:
    """Hydra's own +key, ~key and hydra.* would get past the schema, and do nothing here."""
    for override in overrides:
        if override.startswith(("+", "~", "hydra.", "hydra/")):
            raise ConfigError(f"{override!r} is not a setting; settings are key=value with a key of the schema; drop the prefix")


def keys_of(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a schema, groups included."""
    keys: list[str] = []
    for item in dataclasses.fields(schema):
        key = prefix + item.name
        keys.append(key)
        kind = _dataclass_of(schema, item.name)
        if kind is not None:
            keys += keys_of(kind, key + ".")
            children: list[type] = kind.__subclasses__()
            for child in children:
                keys += [extra for extra in keys_of(child, key + ".") if extra not in keys]
    return keys


def _dataclass_of(schema: type, name: str) -> type | None:
    kind = typing.get_type_hints(schema)[name]
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def _explain(error: Exception, schema: type, overrides: Sequence[str]) -> str:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    texts = [str(item) for item in chain]
    for item in chain:
        if isinstance(item, ConfigError):
            return str(item)
    text = "\n".join(texts)
    known = keys_of(schema)
    key = next((str(getattr(item, "full_key", "") or "") for item in chain if getattr(item, "full_key", None)), "")
    refused = re.search(r"Could not override '([^']+)'|Error merging override (\S+?)=", text)
    if refused:
        named = refused.group(1) or refused.group(2)
        key = named if len(named) >= len(key) else key
    if "not in struct" in text or "not in '" in text:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key} is not a setting; keys outside the schema are refused{hint}"
    group = re.search(r"Could not find '([^']+)'", text)
    if group:
        wanted = group.group(1)
        folder = CONFIG_DIR / Path(wanted).parent
        names = sorted(path.stem for path in folder.glob("*.yaml"))
        near = difflib.get_close_matches(Path(wanted).name, names, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{Path(wanted).parent}={Path(wanted).name} does not exist; choose one of {', '.join(names)}{hint}"
    value = next((over.partition("=")[2] for over in reversed(overrides) if over.startswith(f"{key}=")), None)
    if any(isinstance(item, OverrideParseException) for item in chain):
        bad = next((over for over in overrides if not _can_be_read(over)), " ".join(overrides))
        return f"{bad!r} cannot be read as a setting; settings are key=value; look at --help"
    reason = next((text.splitlines()[0] for text in reversed(texts) if text.strip()), "refused")
    if "is not a ListConfig" in reason:
        items = str(value).strip("'[]")
        return f"{key}={items}; a list is needed; write {key}=[{items}]"
    reason = reason.replace("Value '$VALUE' of type '$VALUE_TYPE'", "the value").replace("$FULL_KEY", key)
    shown = f"{key}={value}" if key and value is not None else key or "the configuration"
    return f"{shown}: {reason}; change the value"


def _readable(override: str) -> str:
    """key=value with the value in quotes where the grammar needs them: a path may hold blanks and letters of any script."""
    key, equals, value = override.partition("=")
    if not equals or _can_be_read(override):
        return override
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + (found[2] and "\\'"), value)
    quoted = f"{key}='{escaped}'"
    return quoted if _can_be_read(quoted) else override


def _can_be_read(override: str) -> bool:
    try:
        return not OverridesParser.create().parse_override(override).is_sweep_override()  # a,b means two runs to Hydra
    except HydraException:
        return False


NO_STORAGE = 74  # EX_IOERR of sysexits.h; cluster/supervision/policy.py has the same
DISK_SAYS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)  # no room, or the disk itself fails


def run_command(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call a command's `main`; a mistake becomes one line on stderr. Exit code 2: the user's mistake, 74: a disk
    that somebody may mend, 1: what else is wrong with the run's state."""
    try:
        return int(main(list(sys.argv[1:] if argv is None else argv)) or 0)
    except (ConfigError, DataError) as error:
        say_error(f"error: {error}")
        return 2
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        say_error(f"error: {error.strerror or error}{where}; check that the place exists, can be written and has room")
        return NO_STORAGE if error.errno in DISK_SAYS else 2
    except StateError as error:
        say_error(f"error: {error}")
        return NO_STORAGE if isinstance(error, StorageError) else 1
    except KeyboardInterrupt:
        say_error("interrupted")
        return 130
