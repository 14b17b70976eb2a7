"""`python -m trainer.report RUN [RUN ...] [--out FILE]`: write a run's page anew, or one page that compares several runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = """Write the report of a run from its run folder, or a page that compares several runs.

One run: RUN/report/index.html is written anew, also for a run that is still going or that crashed.
Several: settings that differ, scores beside one another, curves over one another, in comparison.html beside the first run."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.report", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folder, for example runs/demo")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the page goes")
    chosen = parser.parse_args(argv)
    problem = _problem(chosen.runs, chosen.out)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    try:
        print(f"written: {_write(chosen.runs, chosen.out)}")
    except OSError as error:
        print(f"error: the page cannot be written: {error}; choose another --out", file=sys.stderr)
        return 1
    return 0


def _write(runs: list[Path], out: Path | None) -> Path:
    if len(runs) == 1:
        from trainer.report.page import write_report

        return write_report(runs[0], out=out)
    from trainer.report.compare import write_comparison

    return write_comparison(runs, out or runs[0].absolute().parent / "comparison.html")


def _problem(runs: list[Path], out: Path | None) -> str | None:
    """What is wrong with the command, in one line; None where nothing is."""
    from trainer.report.run import MARKS, is_run

    for number, run in enumerate(runs):
        if not is_run(run):
            return f"run={run}; none of {', '.join(MARKS)} is there; give a run folder, for example runs/demo"
        if run.absolute() in [other.absolute() for other in runs[:number]]:
            return f"run={run} is given twice; each run once; leave one out"
    if out is not None and out.is_dir():
        return f"--out={out} is a folder; the page is one file; give --out {out / 'report.html'}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
