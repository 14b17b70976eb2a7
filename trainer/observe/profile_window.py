"""Which updates are profiled: the words of a setting or a request in, numbers out. Imports nothing of the trainer."""

from __future__ import annotations

import re

from data_pipeline.errors import ConfigError

# An update has about ten thousand events, 3 KiB each until they are written. cluster/commands/profiling.py has the same number
MAX_STEPS = 50
_WINDOW = re.compile(r"steps\[(\d+):(\d+)\]")


def parse_window(key: str, text: str) -> tuple[int, int]:
    """`steps[a:b]` as (a, b): profiled is what comes after `a` updates until `b` are done. Raises ConfigError."""
    found = _WINDOW.fullmatch(text.strip())
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < last - first <= MAX_STEPS:
        raise ConfigError(
            f"{key}={text}; steps[a:b] is needed, from update a to b with a < b <= a + {MAX_STEPS}; "
            f"for example {key}='steps[100:120]'"
        )
    return first, last


def parse_request(text: str, step: int) -> tuple[int, int, bool]:
    """(first, last, all ranks) of a request that is read after `step` updates. Raises ConfigError."""
    first, last, everyone = step, step + 20, False
    for word in text.split():
        key, _, value = word.partition("=")
        if word.startswith("steps["):
            first, last = parse_window("profile/request", word)
        elif key == "steps" and value.isdecimal() and 0 < int(value) <= MAX_STEPS:
            last = step + int(value)
        elif word in ("ranks=all", "ranks=0"):
            everyone = word == "ranks=all"
        else:
            raise ConfigError(
                f"profile/request: {word!r}; steps=N up to {MAX_STEPS}, steps[a:b] and ranks=all|0 are known; mend it"
            )
    return first, last, everyone
