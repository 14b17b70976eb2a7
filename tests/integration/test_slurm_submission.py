"""Answers that are lost between a real Slurm and us: the job that was submitted is taken back before there is a second one."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.backends import slurm, slurm_commands
from cluster.config import LaunchConfig, LaunchError, parse
from tests.integration.slurm_cluster import SlurmCluster, require_slurm

pytestmark = pytest.mark.slow

# Does what the real program does, then says that there was no answer, as often as a file has lines.
LOSES_ANSWERS = """#!/bin/sh
case "$*" in *--test-only*) exec {real} "$@";; esac
{real} "$@" > {out} || exit
if [ -s {faults} ]; then
    sed -i 1d {faults}
    echo "{name}: error: Socket timed out on send/recv operation" >&2
    exit 1
fi
cat {out}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    require_slurm()
    with SlurmCluster(num_nodes=1, cpus_per_node=4) as running:
        yield running


class Losing:
    """Slurm's programs, of which the next few answers can be lost."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name in ("sbatch", "squeue", "scancel"):
            real = shutil.which(name, path=cluster.environment["PATH"])
            text = LOSES_ANSWERS.format(real=real, name=name, out=folder / f"{name}.out", faults=folder / name)
            (self.programs / name).write_text(text)
            (self.programs / name).chmod(0o755)

    def lose(self, program: str, times: int) -> None:
        (self.folder / program).write_text("x\n" * times)


@pytest.fixture
def losing(cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Losing:
    made = Losing(cluster, tmp_path)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{made.programs}:{cluster.environment['PATH']}")
    monkeypatch.setattr(slurm_commands, "PAUSE", 0.1)
    return made


def point(folder: Path, name: str, *more: str) -> tuple[LaunchConfig, list[str]]:
    (folder / "program.py").write_text("import time\ntime.sleep(600)\n")
    words = ["--runs", str(folder / "runs"), "--gpus-per-node", "0", "--command", str(folder / "program.py")]
    words += ["--sbatch", "comment=it's mine", *more, f"name={name}"]
    return parse(words), words


def live(cluster: SlurmCluster) -> dict[str, str]:
    """Comment of each job that waits or runs."""
    lines = cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING", "--format=%F %k").splitlines()
    return dict(line.split(None, 1) for line in lines)


@pytest.mark.parametrize("points", [1, 2])
@pytest.mark.parametrize("held", [True, False])
def test_one_job_is_left_however_many_answers_are_lost(
    cluster: SlurmCluster, losing: Losing, tmp_path: Path, held: bool, points: int
) -> None:
    for program, times in {"sbatch": 2, "squeue": 2, "scancel": 1}.items():
        losing.lose(program, times)
    more = ["--sbatch", "hold="] if held else []
    ids = slurm.submit_array([point(tmp_path, f"run{number}", *more) for number in range(points)])
    job = ids[0].partition("_")[0]
    found = live(cluster)
    assert set(found) == {job} and found[job].startswith("it's mine slotstream ") and len(ids) == points
    for number, own in enumerate(ids):
        run = tmp_path / "runs" / f"run{number}"
        assert json.loads((run / "job.json").read_text())["id"] == own
        assert stat.S_IMODE((run / "slurm").stat().st_mode) == 0o700
    cluster.run("scancel", job)
    cluster.until(lambda: not cluster.run("squeue", "--noheader"), "the queue is empty")


def test_silence_leaves_the_mark_to_look_for(cluster: SlurmCluster, losing: Losing, tmp_path: Path) -> None:
    losing.lose("sbatch", 1)
    losing.lose("squeue", 100)
    with pytest.raises(LaunchError) as error:
        slurm.submit_array([point(tmp_path, "run", "--sbatch", "hold=")])
    mark = str(error.value).split("look for '")[1].partition("'")[0]
    [(job, comment)] = live(cluster).items()
    assert mark in comment and "\n" not in str(error.value)
    cluster.run("scancel", job)


def test_a_job_that_cannot_be_recorded_is_withdrawn(cluster: SlurmCluster, losing: Losing, tmp_path: Path) -> None:
    (tmp_path / "runs" / "unrecorded" / "job.json" / "full").mkdir(parents=True)  # a folder: it cannot be written
    with pytest.raises(LaunchError, match="^the job cannot be recorded: .*; it is withdrawn; mend that and launch again"):
        slurm.submit_array([point(tmp_path, "unrecorded")])
    ended = cluster.run("squeue", "--noheader", "--states=CANCELLED,COMPLETING", "--name=unrecorded", "--format=%Z")
    assert ended.split() == [os.getcwd()] and not live(cluster) and os.listdir(tmp_path / "runs" / "unrecorded") == ["job.json"]
