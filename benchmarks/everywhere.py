"""Command: one training, one command, each backend: is it the same run? `python -m benchmarks.everywhere --nodes 8`

Comes in: a number of nodes and the backends. Goes out: a table, the hash of the order of samples and of the last checkpoint's
tensors by backend; exit code 1 unless all are equal. All on this machine: Slurm is a controller with a slurmd for each node, Ray
has a raylet for each, local nodes are hosts in network namespaces where that can be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # as a script: this folder's modules are benchmarks.*

from benchmarks.chaos_places import PLACES
from benchmarks.chaos_run import ChaosError, Run, served_shards

PATIENCE_S = 600.0


def train_on(backend: str, nodes: int, steps: int, folder: Path) -> dict[str, str]:
    """One run to its end. Raises: ChaosError when it ends otherwise."""
    with ExitStack() as stack:
        place = stack.enter_context(PLACES[backend](nodes))
        data = stack.enter_context(served_shards(folder, place))
        run = Run(folder, f"on_{backend}", steps, place, data)
        stack.callback(run.close)
        began = time.monotonic()
        run.start()
        run.until(lambda: run.exit_code() is not None, "the run ends", PATIENCE_S)
        ranks = len(list((run.run_dir / "order").glob("rank*.jsonl")))
        order = hashlib.sha256(json.dumps(sorted(run.order().items())).encode()).hexdigest()
        once = run.positions() == list(range(len(run.positions())))
        found = {"ranks": str(ranks), "order": order, "exactly once": str(once).lower(), **run.digests()}
        return {**found, "seconds": f"{time.monotonic() - began:.0f}"}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.everywhere", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--backends", default=",".join(PLACES), help="default: %(default)s")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is taken away
    found: dict[str, dict[str, str]] = {}
    for backend in options.backends.split(","):
        with tempfile.TemporaryDirectory(prefix="slotstream_everywhere_") as folder:
            try:
                found[backend] = train_on(backend, options.nodes, options.steps, Path(folder))
            except ChaosError as error:
                print(f"{backend}: {error}", file=sys.stderr)
                return 1
        print(f"{backend:8s} " + "  ".join(f"{key} {value[:16]}" for key, value in found[backend].items()), flush=True)
    differ = [key for key in next(iter(found.values())) if key != "seconds" and len({row[key] for row in found.values()}) > 1]
    print(f"differ: {', '.join(differ)}" if differ else f"equal on {', '.join(found)}: order and weights, byte for byte")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
