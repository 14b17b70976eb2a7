"""Ranks by fork: a process that has imported everything once makes as many sets of ranks as a test needs, at little cost."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.integration.ranks import free_port, rank_environment


def run_forked(world_size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each rank, by way of JSON. The caller must not have started threads or groups."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            _become(rank, world_size, port, folder, function, arguments)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        told = "\n".join(path.read_text() for path in sorted(folder.glob("error*.txt")))
        raise AssertionError(f"{function.__name__}{arguments}: exit codes {codes}\n{told}")
    return [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(world_size)]


def _become(
    rank: int, world_size: int, port: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    code = 1
    try:
        os.environ.update(rank_environment(rank, world_size, port))
        (folder / f"result{rank}.json").write_text(json.dumps(function(*arguments)))
        code = 0
    except BaseException:
        (folder / f"error{rank}.txt").write_text(f"rank {rank}\n{traceback.format_exc()}")
    finally:
        os._exit(code)
