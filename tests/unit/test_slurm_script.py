"""What Slurm is asked for, without a Slurm: directives, scripts, a site's defaults, the budget of requeues."""

from __future__ import annotations

import dataclasses
import shlex
import sys

import pytest

from cluster import site_flags
from cluster.backends.slurm_commands import one_line
from cluster.backends.slurm_script import agent_words, command, directives, job_words, parsed, script, seconds_of, written
from cluster.backends.slurm_session import count_requeue, is_ours
from cluster.backends.slurm_watch import describe
from cluster.config import LaunchConfig, LaunchError, parse


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("45m", 2700), ("8h", 28800), ("90s", 90), ("2d", 172800), ("10:30", 630), ("1:30:00", 5400), ("1-12", 129600),
     ("1-12:30:15", 131415)],
)  # fmt: skip
def test_times_as_slurm_and_people_write_them(text, seconds):
    assert seconds_of(text) == seconds
    assert seconds_of(written(seconds)) == seconds


def test_what_is_no_time_is_refused():
    for text in ("soon", "1:2:3:4", "-5", ""):
        with pytest.raises(LaunchError, match="a time limit is needed"):
            seconds_of(text)


def test_slurm_warns_early_but_never_at_the_start():
    asked = {time: directives(LaunchConfig(time=time), "/")["signal"] for time in (None, "8h", "2")}
    assert asked == {None: "B:USR2@120", "8h": "B:USR2@120", "2": "B:USR2@30"}


def test_a_job_that_may_shrink_survives_a_dead_node():
    assert "no-kill" in directives(LaunchConfig(nodes=4, min_nodes=2), "/")
    assert "no-kill" not in directives(LaunchConfig(nodes=4), "/")


def test_options_of_sbatch_are_added_but_do_not_replace_ours():
    found = directives(LaunchConfig(sbatch=("mail-type=END", "--hold=")), "/")
    assert found["mail-type"] == "END" and found["hold"] == ""
    for entry in ("nodes=3", "output=x", "no-requeue="):
        with pytest.raises(LaunchError, match="the launcher sets"):
            directives(LaunchConfig(sbatch=(entry,)), "/")
    with pytest.raises(LaunchError, match="long option"):
        directives(LaunchConfig(sbatch=("a b=1",)), "/")


def test_the_script_reads_back_and_is_shell():
    words = ["--nodes", "2", "--setup", "module load 'a b'", "--sbatch", "comment=two words", "name=it's"]
    config = parse(words)
    text = script(config, words, "/some where/else")
    assert parsed(text) == directives(config, "/some where/else")
    assert text.splitlines()[-2] == "trap '' TERM" and "module load 'a b'" in text.splitlines()
    assert shlex.split(text.splitlines()[-1])[1:] == command(config, words)
    assert command(config, words)[-7:] == words


def test_the_job_gets_the_words_without_what_ends_at_once(tmp_path, monkeypatch):
    (tmp_path / "ours.yaml").write_text("partition: gpu\nexclusive: true\nsetup: [a, b c]\n")
    monkeypatch.setattr(site_flags, "FOLDER", tmp_path)
    words = ["--cluster", str(tmp_path / "ours.yaml"), "--detach", "--script=x", "--nodes", "2", "name=a"]
    assert job_words(words) == ["--partition=gpu", "--exclusive", "--setup=a", "--setup=b c", "--nodes", "2", "name=a"]
    given, written_out = parse(words), parse(job_words(words))
    changed = {"cluster": None, "detach": False, "script": None}
    assert dataclasses.replace(given, **changed) == written_out


def test_flags_win_over_a_site_and_a_time_stays_a_time(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("time: 8:00:00\nnodes: 4\npartition: gpu\n")
    config = parse(["--cluster", str(path), "--partition", "debug"])
    assert (config.time, config.nodes, config.partition) == ("8:00:00", 4, "debug")


@pytest.mark.parametrize(
    ("text", "says"),
    [("partitoin: gpu\n", "did you mean partition"), ("nodes: many\n", "takes a number"), ("nodes: [1, 2]\n", "takes one value"),
     ("exclusive: 3\n", "on or off"), ("- a\n", "holds no keys"), ("a: [\n", "cannot be read"), ("dry-run: true\n", "is no flag"),
     ("setup: {a: b}\n", "a list of texts")],
)  # fmt: skip
def test_a_wrong_site_is_one_line(tmp_path, text, says):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(LaunchError, match=says) as error:
        parse(["--cluster", str(path)])
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_site_that_is_not_there_is_refused_and_the_example_is_right():
    with pytest.raises(LaunchError, match="did you mean example"):
        parse(["--cluster", "exmaple"])
    config = parse(["--cluster", "example"])
    assert config.backend == "slurm" and config.time == "8:00:00" and directives(config, "/")["gpus-per-node"] == "8"


def test_agents_in_a_container():
    agent = [sys.executable, "/code/cluster/agent.py", "--slot", "3"]
    assert agent_words(LaunchConfig(), agent) == ([], agent)
    apptainer = LaunchConfig(container="/images/a.sif", python="python3", run_dir="/runs/a")
    options, words = agent_words(apptainer, agent)
    assert not options and words[:3] == ["apptainer", "exec", "--nv"] and words[-5:] == ["/images/a.sif", "python3", *agent[1:]]
    assert "/runs/a" in words
    options, words = agent_words(dataclasses.replace(apptainer, container="me#a:1", container_runtime="pyxis"), agent)
    assert options[0] == "--container-image=me#a:1" and "/runs/a:/runs/a" in options[1] and words == ["python3", *agent[1:]]
    assert command(apptainer, [])[0] == sys.executable  # the launcher runs outside


def test_requeues_are_counted_and_a_newer_checkpoint_refills(tmp_path):
    config = LaunchConfig(run_dir=str(tmp_path), max_requeues=2)
    (tmp_path / "slurm").mkdir()
    assert [count_requeue(config, "7") for _ in range(3)] == [True, True, False]
    saved = tmp_path / "checkpoints" / "step_00000005"
    saved.mkdir(parents=True)
    (saved / "manifest.json").touch()
    assert [count_requeue(config, "7") for _ in range(3)] == [True, True, False]
    assert count_requeue(config, "8")
    (tmp_path / "slurm" / "requeues.json").write_text("[broken")
    assert count_requeue(config, "8")


def test_only_a_job_that_nobody_else_decides_about_is_requeued():
    mine = {"SLURM_RESTART_COUNT": "1"}
    assert is_ours({"JobState": "RUNNING", "Restarts": "1"}, mine)
    assert not is_ours({"JobState": "COMPLETING", "Restarts": "1"}, mine)  # somebody cancelled it
    assert not is_ours({"JobState": "RUNNING", "Restarts": "2"}, mine)  # Slurm has requeued it already
    assert not is_ours({}, mine)


def test_states_in_a_few_words():
    assert describe({"JobId": "3", "JobState": "PENDING", "Reason": "Resources", "Restarts": "0"}).name == "queued"
    again = describe({"JobId": "3", "JobState": "PENDING", "Reason": "BeginTime", "Restarts": "1"})
    assert again.name == "queued" and "started again" in again.detail
    assert describe({"JobId": "3", "JobState": "COMPLETING", "NodeList": "n1"}).name == "running"
    assert describe({"JobId": "3", "JobState": "NODE_FAIL", "ExitCode": "0:0"}).name == "ended"


def test_what_slurm_says_becomes_one_line():
    said = "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition name\n"
    assert one_line(said) == "invalid partition specified: x; Invalid partition name"
    assert one_line("allocation failure: Invalid qos") == "Invalid qos"
