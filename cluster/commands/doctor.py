"""`launch.py doctor`: is this machine, or a whole cluster, fit to train? Words in; checks with advice, and an exit code out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.commands.doctor_checks import local_checks
from cluster.commands.doctor_node import MARK, REPORT
from cluster.commands.doctor_software import OK, PROBLEM, WARNING, Check
from cluster.commands.run_reader import read_json
from cluster.commands.runs import CommandParser
from cluster.commands.tables import screen_width, span
from cluster.config import LaunchConfig, parse
from cluster.flags import LaunchError

HELP = """Checks whether this machine is fit to train, and says what to mend. Starts nothing that stays, installs nothing.

  without --nodes   this machine: Python, packages, devices, the folder of runs (write, rename, lock, speed, room), network,
                    open files, shared memory, Slurm and Ray clients; some seconds
  with --nodes N    a short job on N nodes, started as a launch would be: the same checks on each of them, and between them:
                    equal versions, clocks, one run folder that all see, ports, the time of an all-reduce
  other flags       are the launcher's: --backend, --gpus-per-node, --partition, --address, --interface ...: see launch.py --help

Exit code: 0 nothing is wrong (warnings may be), 1 there is a problem."""
LAUNCHER = Path(__file__).resolve().parent.parent / "launch.py"
WORDS = {OK: "ok", WARNING: "warning", PROBLEM: "PROBLEM"}
ORDER = {PROBLEM: 0, WARNING: 1, OK: 2}


def parser() -> CommandParser:
    made = CommandParser("doctor", "[--nodes N] [--backend B] [--runs DIR] [--json] [launcher's flags]", HELP)
    made.add_argument("--nodes", type=int, metavar="N", help="check N nodes and what is between them")
    made.add_argument("--backend", default="auto", metavar="B", help="auto, local, slurm or ray (default auto)")
    made.add_argument("--address", metavar="A", help="Ray cluster: HOST:PORT")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def main(words: Sequence[str]) -> int:
    """Check and print; 0, or 1 when there is a problem. Raises LaunchError for a wrong flag."""
    flags, more = parser().parse_known_args(list(words))
    begun = time.monotonic()
    runs = Path(os.path.abspath(flags.runs))
    if flags.nodes is None:
        parse([*more, "--backend", flags.backend])  # refuses what is no flag
        checks, _ = local_checks(runs, backend=flags.backend, address=flags.address)
        title = f"this machine ({os.uname().nodename})"
    else:
        checks = _ask_nodes(flags.nodes, runs, flags, more)
        title = f"{flags.nodes} nodes"
    if flags.json:
        print(json.dumps([check.as_dict() for check in checks], indent=1), flush=True)
    else:
        print("\n".join(render(checks, title, screen_width(), time.monotonic() - begun)), flush=True)
    return int(any(check.result == PROBLEM for check in checks))


def _ask_nodes(nodes: int, runs: Path, flags: Any, more: Sequence[str]) -> list[Check]:
    """Run the job on the nodes; what they found."""
    name = f"doctor-{os.uname().nodename}-{os.getpid()}"
    words = ["--nodes", str(nodes), "--backend", flags.backend, "--runs", str(runs), "--max-restarts", "0", *more]
    words += ["--address", flags.address] if flags.address else []
    words += ["--command", "-m cluster.commands.doctor_node", f"name={name}"]
    config = parse(words)
    if config.dry_run or config.detach:
        raise LaunchError("doctor --nodes waits for what its nodes say; leave --dry-run and --detach out")
    folder = runs / name
    print(f"asking {nodes} nodes ...", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, str(LAUNCHER), *words], capture_output=True, text=True)
    content = read_json(folder / REPORT) or _from_output(done.stdout)
    if not content:
        return [_failed(config, done)]
    shutil.rmtree(folder, ignore_errors=True)
    return collect(content)


def _from_output(text: str) -> dict[str, Any]:
    """The report as rank 0 printed it: its run folder may not be ours."""
    for line in text.splitlines():
        if MARK in line:
            try:
                return dict(json.loads(line.partition(MARK)[2]))
            except ValueError:
                return {}
    return {}


def _failed(config: LaunchConfig, done: subprocess.CompletedProcess[str]) -> Check:
    said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    advice = f"mend that, and look at {config.run_dir}" if os.path.isdir(config.run_dir) else "mend that"
    return Check("launch", PROBLEM, f"exit code {done.returncode}: {' / '.join(said[-3:])}"[:500], advice)


def collect(content: Mapping[str, Any]) -> list[Check]:
    """One list of what all nodes said: what is equal on all of them once, problems with the names of their nodes."""
    found: dict[str, list[tuple[str, Check]]] = {}
    reports = [report for report in content.get("reports", []) if "checks" in report]
    for report in reports:
        for entry in report["checks"]:
            found.setdefault(entry["name"], []).append((f"node {report['node']} ({report['host']})", Check(**entry)))
    checks = []
    for entries in found.values():
        for result in (OK, WARNING, PROBLEM):
            checks += _merged([(node, check) for node, check in entries if check.result == result], len(reports))
    return [*checks, *(Check(**entry) for entry in content.get("checks", []))]


def _merged(entries: Sequence[tuple[str, Check]], nodes: int) -> list[Check]:
    if not entries:
        return []
    first = entries[0][1]
    if first.result == OK:
        equal = len({check.value for _, check in entries}) == 1
        where = f"; the same on {len(entries)} nodes" if equal else f" on {entries[0][0]}; {len(entries)} nodes are ok"
        where = f" on {entries[0][0]}" if len(entries) == 1 else where
        return [Check(first.name, OK, first.value + (where if nodes > 1 else ""))]
    if len(entries) == nodes and len({check.value for _, check in entries}) == 1:
        return [Check(first.name, first.result, f"{first.value}; the same on {nodes} nodes", first.advice)]
    return [Check(check.name, check.result, f"{node}: {check.value}", check.advice) for node, check in entries]


def render(checks: Sequence[Check], title: str, width: int | None, seconds: float) -> list[str]:
    """Lines for a terminal; what to mend stands beneath its check."""
    wide = max((len(check.name) for check in checks), default=0)
    indent = " " * (9 + wide + 2)
    lines = [f"{title}:"]
    for check in checks:
        head = f"{WORDS[check.result]:<9}{check.name:<{wide}}  "
        lines += textwrap.wrap(check.value, width or 10_000, initial_indent=head, subsequent_indent=indent) or [head.rstrip()]
        if check.result != OK and check.advice:
            lines += textwrap.wrap(f"-> {check.advice}", width or 10_000, initial_indent=indent, subsequent_indent=indent + "   ")
    problems = sum(check.result == PROBLEM for check in checks)
    warnings = sum(check.result == WARNING for check in checks)
    verdict = f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}" if problems or warnings else "nothing to mend"
    return [*lines, f"{verdict} ({len(checks)} checks in {span(seconds)})"]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
