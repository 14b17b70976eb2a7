"""Start a job on N nodes and see it to its end: command line in; run folder, live output, verdict and exit code out.

python cluster/launch.py --nodes 2 --ranks-per-node 2 experiment=ssync_movi_c optim.max_steps=200
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder cluster/ must not be where modules are looked for
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports ends it without a traceback
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cluster.backends import BACKENDS, choose_backend
from cluster.commands import plan as planner
from cluster.config import JOBS, LaunchConfig, LaunchError, parse
from cluster.layout import checkout_path
from cluster.verdict import INTERRUPTED

# Commands beside the jobs: module and function, (words after the command) -> exit code; loaded when they are used.
COMMANDS = {
    "status": "cluster.commands.status:main",
    "logs": "cluster.commands.logs:main",
    "cancel": "cluster.commands.control:cancel",
    "resume": "cluster.commands.control:resume",
    "doctor": "cluster.commands.doctor:main",
    "monitor": "cluster.commands.monitor:main",
    "profile": "cluster.commands.profiling:main",
}
SWEEP = "cluster.commands.sweep:main"  # (all words) -> exit code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command or launch; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in COMMANDS:
            return _load(COMMANDS[words[0]])(words[1:])
        if planner.is_plan(words):
            return planner.main(words)
        if "--multirun" in words:
            return _load(SWEEP)(words)
        config = parse(words)
        backend = choose_backend(config)
        return dry_run(config, backend, words) if config.dry_run else BACKENDS[backend].launch(config, words)
    except LaunchError as error:
        say(str(error))
        return error.code
    except BrokenPipeError:  # whoever read our output has enough: `status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        say(f"cannot launch: {error}; check the path, its permissions and the machine's limits")
        return 1
    except KeyboardInterrupt:  # before anything was started
        return INTERRUPTED


def _load(place: str) -> Callable[[Sequence[str]], int]:
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)


def dry_run(config: LaunchConfig, backend: str, words: Sequence[str]) -> int:
    print(BACKENDS[backend].render(config, words), flush=True)
    if config.command or not JOBS[config.job].tells_plan:
        return 0
    path = checkout_path(os.environ.get("PYTHONPATH"))
    environment = os.environ if path is None else {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *config.job_command, "--dry-run"], env=environment).returncode


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
