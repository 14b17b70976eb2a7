"""The run folder: numbered attempts, events, records without secrets, target lists that go away."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import run_folder
from cluster.run_folder import (
    HIDDEN,
    EventLog,
    clean_environment,
    clean_word,
    make_attempt,
    newest_checkpoint,
    next_attempt,
    withdraw_targets,
    write_job,
    write_launch_record,
)


def test_attempts_count_up_and_never_share_a_folder(tmp_path: Path) -> None:
    assert next_attempt(tmp_path) == 1
    assert [make_attempt(tmp_path) for _ in range(3)] == [1, 2, 3]
    (tmp_path / "attempts" / "11").mkdir()
    (tmp_path / "attempts" / "3x").mkdir()
    assert make_attempt(tmp_path) == 12


def test_events_are_lines_and_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path, "s1")
    log.write("session", None, nodes=2)
    log.write("exit", 3, rank=1)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(line["event"], line["attempt"], line["session"]) for line in lines] == [("session", None, "s1"), ("exit", 3, "s1")]
    EventLog(Path("/dev/full/x"), "s1").write("exit", 1)


def test_the_job_is_recorded_without_secrets(tmp_path: Path) -> None:
    write_job(tmp_path / "run", "train", "slurm", "4711", ["--nodes", "2", "data.api_key=s3cret"])
    job = json.loads((tmp_path / "run" / "job.json").read_text())
    assert (job["backend"], job["id"], job["words"]) == ("slurm", "4711", ["--nodes", "2", "data.api_key=<hidden>"])


def test_a_job_beside_the_training_has_a_record_of_its_own(tmp_path: Path) -> None:
    for job in ("train", "evaluate"):
        write_job(tmp_path, job, "local", job, [])
    found = {path.name: json.loads(path.read_text())["id"] for path in tmp_path.iterdir()}
    assert found == {"job.json": "train", "job_evaluate.json": "evaluate"}


def test_progress_is_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == -1
    for name, complete in (("step_00000010", True), ("step_00000200", True), ("step_00000300", False), ("step_x", True)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if complete:
            (tmp_path / "checkpoints" / name / "manifest.json").touch()
    assert newest_checkpoint(tmp_path) == 200


def test_records_hold_what_changes_a_run_and_no_secret(tmp_path: Path) -> None:
    environment = {"OMP_NUM_THREADS": "2", "HF_TOKEN": "s3cret", "RAY_AUTH_TOKEN": "s3cret", "AWS_SECRET_ACCESS_KEY": "s3cret",
                   "NCCL_PROXY": "http://me:s3cret@host/x", "MY_THING": "s3cret"}  # fmt: skip
    write_launch_record(tmp_path, ["launch.py", "data.api_key=s3cret", "data.root=s3://me:s3cret@b/x"], environment, {"nodes": 2})
    text = (tmp_path / "launch.json").read_text()
    assert "s3cret" not in text
    record = json.loads(text)
    assert record["environment"]["OMP_NUM_THREADS"] == "2" and record["nodes"] == 2
    assert {"command", "host", "pid", "started", "git"} <= set(record)


def test_names_of_secrets() -> None:
    assert clean_word("a.password=x") == "a.password=<hidden>"
    assert clean_word("optim.lr=1") == "optim.lr=1"
    assert clean_word("model.query_key_gain=2") == "model.query_key_gain=2"  # a resume needs it
    assert clean_word("data.root=https://host/shards?sig=s3cret") == "data.root=https://host/shards?<hidden>"
    assert clean_environment({"SLURM_JWT": "x", "LANG": "C"}) == {"LANG": "C", "SLURM_JWT": "<hidden>"}


@pytest.mark.parametrize(
    ("word", "shown"),
    [("--setup=export WANDB_API_KEY=s3cret", "--setup=export WANDB_API_KEY=<hidden>"),
     ("module load a; export WANDB_API_KEY='s3cret, too'; b", "module load a; export WANDB_API_KEY=<hidden>"),
     ("--sbatch=export=ALL,HF_TOKEN=s3cret", "--sbatch=export=ALL,HF_TOKEN=<hidden>"),
     ("export=HF_TOKEN=s3cret", "export=HF_TOKEN=<hidden>"),
     ("--wrap=env A=1 KEYS[0]=s3cret", "--wrap=env A=1 KEYS[0]=<hidden>"),
     ("+data={root: /x, api_key: s3cret}", "+data={root: /x, api_key:<hidden>"),
     ("+data={api_key:s3cret}", "+data={api_key:<hidden>"),
     ('curl -H "Authorization: Bearer s3cret"', 'curl -H "Authorization:<hidden>'),
     ("data.root=http://me:s3@cret@host/x", "data.root=http://<hidden>@host/x"),
     ("data.api_key=", "data.api_key="), ("data.auth.lr=1", "data.auth.lr=1"),
     ("data.root=/private/run=3", "data.root=/private/run=3"),
     ("--address=keyhost:6379", "--address=keyhost:6379"), ("--export=HF_TOKEN", "--export=HF_TOKEN"),
     ("--setup=export TOKENIZERS_PARALLELISM=false", "--setup=export TOKENIZERS_PARALLELISM=false")],
)  # fmt: skip
def test_secrets_within_a_word(word: str, shown: str) -> None:
    assert clean_word(word) == shown and clean_word(shown) == shown


def test_variables_that_hold_other_variables() -> None:
    """`ray job submit` gives the job's env_vars as JSON, srun --export as a list."""
    job = json.dumps({"runtime_env": {"env_vars": {"WANDB_API_KEY": "s3cret", "PLAIN": "s3cret"}}})
    exported = "ALL,HF_TOKEN=s3cret"
    kept = clean_environment({"RAY_JOB_CONFIG_JSON_ENV_VAR": job, "RAY_OTHER": f" {job}", "SLURM_EXPORT_ENV": exported})
    assert kept == {"RAY_OTHER": HIDDEN, "SLURM_EXPORT_ENV": "ALL,HF_TOKEN=<hidden>"}


PIECE = "zq7x"  # of every secret, at its begin and end: no part of one may be recorded
NAMES = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["", "HF_", "wandb-", "MY"]),
        st.sampled_from(["KEY", "token", "Secret", "password", "PASSPHRASE", "credentials", "AUTH", "cookie", "private", "JWT"]),
        st.sampled_from(["", "s", "_ID", "-2", "[0]"]),
    ),
)
PLACES = st.sampled_from([
    "data.{}={}", "+data.{}={}", "--setup=export {}={}", "export {}={}", "A=1 {}='{}' python x", '--setup=a && {}="{}"; b',
    "--sbatch=export={}={}", "--sbatch=export=ALL,{}={},B=2", "export=ALL,{}={}", "--wrap=env {}={}",
    "--command=-m prog --{}={} x=1", "data={{root: /x, {}: {}}}",
    '{{"{}":"{}"}}', "data={{{}:{}}}", "curl -H '{}: {}'", "{} = {}",
])  # fmt: skip


@given(name=NAMES, secret=st.text(max_size=12), place=PLACES, before=st.booleans())
def test_no_part_of_a_secret_is_recorded(
    tmp_path_factory: pytest.TempPathFactory, name: str, secret: str, place: str, before: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "secrets"
    word = place.format(name, PIECE + secret + PIECE)
    words = [word, "--setup", "true"] if before else ["--setup", word, "optim.lr=1"]
    environment = {"SLURM_EXPORT_ENV": word, "RAY_X": json.dumps({"env_vars": {"A": word}}), f"SLURM_{name}": word}
    with mock.patch.object(run_folder, "git_state", return_value=None):
        write_job(folder, "train", "slurm", "1", words)
        write_launch_record(folder, words, environment, {})
    job, launch = ((folder / file).read_text() for file in ("job.json", "launch.json"))
    assert PIECE not in job and PIECE not in launch
    assert all(word in json.loads(job)["words"] for word in words if PIECE not in word)
    assert any(HIDDEN in word for word in json.loads(job)["words"])  # `resume` then says that it cannot repeat it


def test_target_lists_of_an_ended_run_go_and_no_others(tmp_path: Path) -> None:
    own, watched = tmp_path / "run" / "monitoring" / "targets.json", tmp_path / "watched"
    own.parent.mkdir(parents=True)
    watched.mkdir()
    own.write_text("[1]")
    (watched / "mine.json").write_text("[1]")
    (watched / "other.json").write_text("[2]")
    withdraw_targets(tmp_path / "run", str(watched))
    assert not own.exists() and [path.name for path in watched.iterdir()] == ["other.json"]
    withdraw_targets(tmp_path / "run", None)
