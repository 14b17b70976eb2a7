"""The launcher's command line: what becomes a flag, a job, an override, a run folder, and what is refused in which words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.backends import BACKENDS, choose_backend
from cluster.config import BACKEND_NAMES, JOBS, LaunchConfig, LaunchError, duration, override_value, parse, run_name
from cluster.launch import main


def test_flags_job_and_overrides_are_told_apart_in_any_order() -> None:
    config = parse(["--nodes", "3", "train", "experiment=ssync_movi_c", "--ranks-per-node", "2", "~data.cache", "+x.y=-1"])
    assert (config.nodes, config.ranks_per_node, config.job) == (3, 2, "train")
    assert config.overrides == ("experiment=ssync_movi_c", "~data.cache", "+x.y=-1")
    assert config.job_command == ("-m", "trainer.main", *config.overrides)


def test_the_default_is_one_node_that_trains_in_runs_run() -> None:
    config = parse([])
    assert config == LaunchConfig(run_dir=os.path.abspath("runs/run"))
    assert config.job_command == ("-m", "trainer.main")


@pytest.mark.parametrize("job", list(JOBS))
def test_every_job_runs_its_module(job: str) -> None:
    assert parse([job, "a.b=[1,2]"]).job_command == ("-m", JOBS[job].module, "a.b=[1,2]")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--nodez", "3"], ["--nodez", "did you mean --nodes"]),
        (["--dry"], ["--dry", "--dry-run"]),
        (["trian"], ["job 'trian'", "did you mean train"]),
        (["train", "optim.lr"], ["'optim.lr'", "key=value"]),
        (["--nodes", "0"], ["--nodes 0", "at least 1"]),
        (["--nodes", "two"], ["--nodes", "two"]),
        (["--gpus-per-node", "-1"], ["--gpus-per-node -1"]),
        (["--grace", "-3"], ["--grace -3"]),
        (["--backend", "slrum"], ["--backend 'slrum'", "did you mean slurm"]),
        (["--gpus-per-node", "2", "--ranks-per-node", "3"], ["a GPU serves one rank"]),
        (["name=a/b"], ["name='a/b'", "folder name"]),
        (["name=.hidden"], ["name='.hidden'"]),
        (["name=${seed}"], ["name='${seed}'"]),
        (["--runs", "x", "runs=y"], ["--runs x", "runs=y"]),
        (["evaluate", "run=/no/such/run"], ["run=/no/such/run", "no such folder"]),
        (["--max-time", "soon"], ["--max-time soon", "8h"]),
        (["--node-patience", "long"], ["--node-patience long"]),
        (["--nodes", "2", "--min-nodes", "3"], ["--min-nodes 3", "--nodes 2"]),
        (["--max-restarts", "-1"], ["--max-restarts -1"]),
        (["--bind", "core"], ["--bind 'core'", "did you mean cores"]),
        (["--sbatch", "exclusive"], ["--sbatch 'exclusive'"]),
    ],
)
def test_a_wrong_command_is_one_line_that_names_it(words: list[str], parts: list[str]) -> None:
    with pytest.raises(LaunchError) as caught:
        parse(words)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_the_run_folder_comes_from_name_then_experiment_then_run(tmp_path: Path) -> None:
    assert run_name("train", ["experiment=a/b", "name=mine", "name='last'"]) == "last"
    assert run_name("train", ["+experiment=movi/c"]) == "movi_c"
    assert run_name("train", ["experiment=null"]) == "run"
    assert run_name("build-shards", []) == "build-shards"
    assert parse(["--runs", str(tmp_path), "name=x"]).run_dir == str(tmp_path / "x")
    assert parse([f"runs={tmp_path}"]).run_dir == str(tmp_path / "run")
    assert parse(["--runs", "r"]).run_dir == os.path.abspath("r/run")
    build = parse(["build-shards", "name=x", f"runs={tmp_path}", "out=y"])  # a build has no run folder: it would refuse the two
    assert (build.run_dir, build.overrides) == (str(tmp_path / "x"), ("out=y",))
    assert parse(["name=x", "seed=1"]).overrides == ("name=x", "seed=1")


def test_evaluate_works_in_the_folder_that_it_scores(tmp_path: Path) -> None:
    assert parse(["evaluate", f"run={tmp_path}"]).run_dir == str(tmp_path)


def test_override_value_takes_the_last_exact_key() -> None:
    assert override_value(["run.name=a", "name=b", "names=c"], "name") == "b"
    assert override_value(["names=c"], "name") is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1:30", 90), ("1:00:05", 3605)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


def test_the_backend_is_chosen_by_what_is_there(tmp_path: Path) -> None:
    assert set(BACKENDS) | {"auto"} == set(BACKEND_NAMES)
    login = {"PATH": str(tmp_path), "SLURM_CONF": "/etc/there"}
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert choose_backend(parse([]), login) == "slurm"
    assert choose_backend(parse([]), {**login, "SLURM_JOB_ID": "1"}) == "local"  # inside of a job we are one of its nodes
    assert choose_backend(parse([]), {"PATH": "", "SLURM_CONF": "/etc/there"}) == "local"
    assert choose_backend(parse(["--address", "auto"]), login) == choose_backend(parse([]), {"RAY_ADDRESS": "a:1"}) == "ray"
    assert choose_backend(parse(["--backend", "local", "--address", "auto"]), login) == "local"


def test_a_wrong_command_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--backend", "slrum"], ["--nodes", "2", "--min-nodes", "3"], ["--interface", "no0", "--backend", "local"]):
        assert main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1
