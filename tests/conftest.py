"""One thread a process (two ranks share two cores here), and CI's rule: a suite that should run and was skipped is a failure."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", ".hypothesis")

# A skip in CI must begin its reason so. CI runs `make test-kernels` for the second. Slurm and network namespaces, which a user's
# machine may not have, CI has.
ALLOWED_SKIPS = ("gpu:", "triton:")
_skipped: list[str] = []


@pytest.fixture(scope="session")
def one_rank():
    """A group of this process alone, for all files that a worker runs: DeepSpeed keeps the first group that it sees."""
    import torch

    from trainer import distributed

    distributed.start(torch.device("cpu"), 60)
    yield
    distributed.stop()


def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.append(f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")


def pytest_terminal_summary(terminalreporter):
    """What was skipped and why is the last thing printed."""
    if _skipped:
        terminalreporter.section("skipped")
        for line in _skipped:
            terminalreporter.write_line(line)


def pytest_sessionfinish(session, exitstatus):
    forbidden = [line for line in _skipped if not line.split(": ", 1)[1].startswith(ALLOWED_SKIPS)]
    if os.environ.get("CI") == "true" and forbidden and exitstatus == 0:
        print("\nskipped in CI, where everything but GPU tests must run:\n" + "\n".join(forbidden))
        session.exitstatus = 1
