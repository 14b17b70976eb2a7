"""Submission when Slurm's answers are lost: never two jobs, never one that nobody knows of. Small programs stand in for Slurm."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.backends import slurm, slurm_commands
from cluster.config import LaunchConfig, LaunchError, parse

# Jobs are files <id> in a folder, with their comment. What goes wrong is in files there, too: a line each time.
FAKE = """#!{python}
import re, sys
from pathlib import Path
jobs, program, words = Path({jobs!r}), Path(sys.argv[0]).name, sys.argv[1:]
with open(jobs / "calls", "a") as stream:
    stream.write(" ".join([program, *words]) + "\\n")
def away(when):
    faults = jobs / f"{{program}}.{{when}}"
    left = faults.read_text().splitlines() if faults.exists() else []
    faults.write_text("\\n".join(left[1:]))
    if left:
        sys.exit(program + ": error: " + left[0])
if "--test-only" in words:
    sys.exit(0)
away("before")
if program == "sbatch":
    number = 7 + len(list(jobs.glob("*.job")))
    comment = re.search(r"^#SBATCH --comment=(.*)$", Path(words[-1]).read_text(), re.MULTILINE)[1]
    (jobs / f"{{number}}.job").write_text("PENDING " + comment.strip("'"))
    away("after")
    print("Submitted batch job", number)
elif program == "squeue":
    for path in sorted(jobs.glob("*.job")):
        state, _, comment = path.read_text().partition(" ")
        if state in ",".join(words):
            print(path.stem, comment)
elif program == "scancel":
    for number in words:
        path = jobs / f"{{number}}.job"
        path.write_text(path.read_text().replace("PENDING", "CANCELLED"))
"""
TIMED_OUT = "Batch job submission failed: Socket timed out on send/recv operation"


class FakeSlurm:
    def __init__(self, folder: Path) -> None:
        self.jobs = folder / "jobs"
        self.programs = folder / "bin"
        self.jobs.mkdir()
        self.programs.mkdir()
        (self.jobs / "calls").touch()
        for name in ("sbatch", "squeue", "scancel", "srun", "sinfo"):
            path = self.programs / name
            path.write_text(FAKE.format(python=sys.executable, jobs=str(self.jobs)))
            path.chmod(0o755)

    def fails(self, program: str, times: int, when: str = "before", how: str = TIMED_OUT) -> None:
        (self.jobs / f"{program}.{when}").write_text("\n".join([how] * times))

    def live(self) -> list[str]:
        return [path.stem for path in sorted(self.jobs.glob("*.job")) if path.read_text().startswith("PENDING")]

    def comment(self, job: str) -> str:
        return (self.jobs / f"{job}.job").read_text().partition(" ")[2]

    def calls(self, program: str) -> int:
        lines = (self.jobs / "calls").read_text().splitlines()
        return sum(line.split()[0] == program and "--test-only" not in line for line in lines)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    made = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", f"{made.programs}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_commands, "PAUSE", 0.0)
    return made


def point(folder: Path, *words: str) -> tuple[LaunchConfig, list[str]]:
    given = ["--backend", "slurm", "--runs", str(folder / "runs"), *words, *([] if "name=b" in words else ["name=a"])]
    return parse(given), given


def recorded(folder: Path, name: str = "a") -> dict[str, Any]:
    return json.loads((folder / "runs" / name / "job.json").read_text())


@pytest.mark.parametrize("silent", [0, 1, 3])
def test_a_lost_answer_leaves_one_job(fake: FakeSlurm, tmp_path: Path, silent: int) -> None:
    """sbatch has submitted and does not know it, squeue then does not answer for a while."""
    fake.fails("sbatch", 1, "after")
    fake.fails("squeue", silent)
    assert slurm.submit_array([point(tmp_path)]) == ["8"]
    assert fake.live() == ["8"] and fake.calls("sbatch") == 2 and recorded(tmp_path)["id"] == "8"
    assert not list((tmp_path / "runs" / "a" / "slurm").glob("7_*"))


def test_no_second_job_while_slurm_does_not_say_what_is_there(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.fails("sbatch", 1, "after")
    fake.fails("squeue", 100)
    with pytest.raises(LaunchError) as error:
        slurm.submit_array([point(tmp_path)])
    assert fake.calls("sbatch") == 1 and fake.calls("squeue") == slurm_commands.TRIES and fake.live() == ["7"]
    assert f"a job may be submitted; look for '{fake.comment('7')}' in squeue --me" in str(error.value)
    assert "\n" not in str(error.value) and "nothing is submitted" not in str(error.value)


def test_what_squeue_refuses_is_said_with_the_mark(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.fails("sbatch", 1, "after")
    fake.fails("squeue", 1, how="unrecognized option '--me'")
    with pytest.raises(LaunchError, match=r"unrecognized option '--me'; a job may be submitted; look for 'slotstream \w{12}' in"):
        slurm.submit_array([point(tmp_path)])
    assert fake.calls("sbatch") == 1


def test_a_cancellation_that_is_lost_is_made_again(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.fails("sbatch", 1, "after")
    fake.fails("scancel", 2)
    assert slurm.submit_array([point(tmp_path)]) == ["8"] and fake.live() == ["8"] and fake.calls("scancel") == 3


def test_a_controller_that_is_away_all_the_time_has_no_job(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.fails("sbatch", 100)
    with pytest.raises(LaunchError, match=r"tried 4 times, nothing is submitted; see scontrol ping"):
        slurm.submit_array([point(tmp_path)])
    assert not fake.live() and not (tmp_path / "runs" / "a").exists()


def test_a_refusal_is_one_line_and_leaves_no_folder(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.fails("sbatch", 1, how="Batch job submission failed: Invalid qos specification")
    with pytest.raises(LaunchError, match=r"^Slurm refuses the job: Invalid qos specification; it was asked for --nodes 1; see"):
        slurm.submit_array([point(tmp_path)])
    assert fake.calls("sbatch") == 1 and not (tmp_path / "runs" / "a").exists()


def test_the_mark_stands_behind_the_users_comment(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.fails("sbatch", 1, "after")
    assert slurm.submit_array([point(tmp_path, "--sbatch", "comment=for the paper")]) == ["8"]
    assert fake.live() == ["8"] and fake.comment("8").startswith("for the paper slotstream ")


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device", "job.json"), KeyboardInterrupt()])
def test_a_job_that_cannot_be_recorded_is_withdrawn(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    def write_job(run_dir: Path, *_: object) -> None:
        if run_dir.name == "b":
            raise fault

    monkeypatch.setattr(slurm, "write_job", write_job)
    with pytest.raises((LaunchError, KeyboardInterrupt)) as error:
        slurm.submit_array([point(tmp_path), point(tmp_path, "name=b")])
    assert fake.calls("sbatch") == 1 and not fake.live()
    if isinstance(fault, OSError):
        said = "the job cannot be recorded: [Errno 28] No space left on device: 'job.json'; it is withdrawn; mend that and"
        assert isinstance(error.value, LaunchError) and str(error.value).startswith(said) and "\n" not in str(error.value)


def test_ctrl_c_while_slurm_is_silent_says_what_may_be_left(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "write_job", interrupted)
    monkeypatch.setattr(slurm_commands, "time", SimpleNamespace(sleep=interrupted))  # others sleep in this process, too
    fake.fails("squeue", 100)
    with pytest.raises(LaunchError, match=r"interrupted; a job may be submitted; look for 'slotstream \w{12}' in squeue --me"):
        slurm.submit_array([point(tmp_path)])


def test_what_the_job_needs_in_full_is_for_its_owner_alone(fake: FakeSlurm, tmp_path: Path) -> None:
    """The script and the pickled words hold secrets as they were given; nothing else of the run folder does."""
    words = ["--setup", "export WANDB_API_KEY=s3cret", "--sbatch", "export=ALL,HF_TOKEN=s3cret", "data.api_key=s3cret"]
    run = tmp_path / "runs" / "a"
    (run / "slurm").mkdir(parents=True, mode=0o755)
    slurm.submit_array([point(tmp_path, *words)])
    holders = [path for path in run.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert {path.parent for path in holders} == {run / "slurm"}, holders
    assert stat.S_IMODE((run / "slurm").stat().st_mode) == 0o700
    assert "export WANDB_API_KEY=<hidden>" in recorded(tmp_path)["words"]
