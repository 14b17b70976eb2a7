"""What runs where: ranks, environments, devices, commands, and the text of a dry run."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import LaunchConfig, LaunchError
from cluster.layout import (
    NodeFacts,
    NodeTask,
    agent_command,
    agent_environment,
    checkout_path,
    describe,
    full_environment,
    gpu_ids,
    gpus_of_a_node,
    node_tasks,
    rank_environment,
    usable_cores,
)
from cluster.processes import Port, exit_of, processes_with, write_json

TASK = NodeTask(
    node=1,
    name="node1",
    nodes=2,
    ranks=3,
    run_dir="/r/x",
    attempt=4,
    master_addr="127.0.0.1",
    master_port=23456,
    threads=5,
    gpus=("6", "7", "8"),
    grace=2.5,
    console=True,
    environment=(("A", "b"),),
    cores=(1, 2, 3),
    command=("-m", "trainer.main", "a=b c", "name='q'"),
)


def nodes(count: int, gpus: Sequence[str] = (), cores: int = 2, **more: Any) -> list[NodeFacts]:
    """Places on one machine, unless `more` says otherwise."""
    facts = {"host": "h", "address": "127.0.0.1", "cores": tuple(range(cores)), "usable": cores, "gpus": tuple(gpus), **more}
    return [NodeFacts(slot=slot, **facts) for slot in range(count)]


def tasks_of(config: LaunchConfig, team: Sequence[NodeFacts], **more: Any) -> list[NodeTask]:
    return node_tasks(config, team, **{"attempt": 1, "master_port": 1, **more})


def test_tasks_and_facts_travel_as_json() -> None:
    for task in (TASK, dataclasses.replace(TASK, gpus=(), cores=(), environment=(), command=("x.py", "--"))):
        assert NodeTask.from_message(json.loads(json.dumps(task.as_message()))) == task
    facts = NodeFacts.of_this_node(3, "10.0.0.1")
    assert NodeFacts.from_message({"type": "hello", **json.loads(json.dumps(facts.as_message()))}) == facts
    with pytest.raises(KeyError):
        NodeFacts.from_message({"slot": 1})


def test_the_token_is_in_the_agents_environment_alone() -> None:
    assert "s3cret" not in " ".join(agent_command("h:1", 2, "/r")) and "s3cret" in agent_environment("s3cret").values()
    assert "s3cret" not in full_environment(TASK, 0, agent_environment("s3cret")).values()


def test_the_environment_of_a_rank() -> None:
    environment = rank_environment(TASK, 2, {})
    expected = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3", "NODE_RANK": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23456", "OMP_NUM_THREADS": "5", "SLOTSTREAM_NODE": "node1",
                "SLOTSTREAM_RUN_DIR": "/r/x", "SLOTSTREAM_ATTEMPT": "4", "PYTHONUNBUFFERED": "1",
                "CUDA_VISIBLE_DEVICES": "6,7,8"}  # fmt: skip
    assert {key: environment.get(key) for key in expected} == expected
    assert "DS_ACCELERATOR" not in environment


def test_without_gpus_a_rank_sees_none_and_deepspeed_is_told() -> None:
    environment = rank_environment(dataclasses.replace(TASK, gpus=()), 0, {"CUDA_VISIBLE_DEVICES": "0"})
    assert environment["DS_ACCELERATOR"] == "cpu" and environment["CUDA_VISIBLE_DEVICES"] == ""


def test_what_the_user_set_stays_and_what_an_outer_launcher_left_goes() -> None:
    base = {"OMP_NUM_THREADS": "9", "LOCAL_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "77", "HOME": "/h"}
    environment = full_environment(TASK, 0, base)
    assert environment["OMP_NUM_THREADS"] == "9" and environment["HOME"] == "/h" and environment["RANK"] == "3"
    assert not {"LOCAL_SIZE", "TORCHELASTIC_USE_AGENT_STORE"} & set(environment)


@given(count=st.integers(1, 5), ranks=st.integers(1, 4), cores=st.integers(1, 64))
def test_ranks_are_numbered_without_gap_and_share_the_cores(count: int, ranks: int, cores: int) -> None:
    config = LaunchConfig(nodes=count, ranks_per_node=ranks, run_dir="/r")
    tasks = tasks_of(config, nodes(count, cores=cores))
    environments = [rank_environment(task, local, {}) for task in tasks for local in range(task.ranks)]
    assert [int(e["RANK"]) for e in environments] == list(range(count * ranks))
    assert {int(e["WORLD_SIZE"]) for e in environments} == {count * ranks}
    threads = [int(e["OMP_NUM_THREADS"]) for e in environments]
    assert min(threads) >= 1 and (sum(threads) <= cores or max(threads) == 1)


@given(count=st.integers(1, 4), there=st.integers(0, 9), asked=st.none() | st.integers(0, 3), ranks=st.none() | st.integers(1, 3))
def test_no_gpu_is_given_to_two_nodes(count: int, there: int, asked: int | None, ranks: int | None) -> None:
    if asked and ranks and asked != ranks:
        return
    config = LaunchConfig(nodes=count, gpus_per_node=asked, ranks_per_node=ranks, run_dir="/r")
    ids = [str(10 + gpu) for gpu in range(there)]
    if asked is not None and asked * count > there:
        with pytest.raises(LaunchError, match=f"this machine has {there}"):
            tasks_of(config, nodes(count, ids))
        return
    tasks = tasks_of(config, nodes(count, ids))
    given_out = [gpu for task in tasks for gpu in task.gpus]
    assert len(set(given_out)) == len(given_out) and set(given_out) <= set(ids)
    assert all(task.gpus == () or len(task.gpus) == task.ranks for task in tasks)


def test_gpus_are_used_when_there_are_enough() -> None:
    assert gpus_of_a_node(LaunchConfig(nodes=2), 8, 2) == 4
    assert gpus_of_a_node(LaunchConfig(nodes=2), 8, 1) == 8
    assert gpus_of_a_node(LaunchConfig(nodes=2, ranks_per_node=3), 8, 2) == 3
    assert gpus_of_a_node(LaunchConfig(nodes=2, ranks_per_node=3), 5, 2) == 0
    assert gpus_of_a_node(LaunchConfig(nodes=2, gpus_per_node=0), 8, 2) == 0


def test_machines_of_their_own_share_nothing_and_keep_their_names() -> None:
    team = [
        *nodes(1, "01", 8, host="a", address="10.0.0.1"),
        dataclasses.replace(nodes(2, "01", 8, host="b")[1], address="10.0.0.2"),
    ]
    tasks = tasks_of(LaunchConfig(nodes=2, run_dir="/r"), team, local=False)
    assert [(task.name, task.gpus, task.threads) for task in tasks] == [("a", ("0", "1"), 4), ("b", ("0", "1"), 4)]
    assert {task.master_addr for task in tasks} == {"10.0.0.1"} and not any(task.console for task in tasks)


def test_nodes_that_are_left_are_numbered_anew_and_keep_their_share() -> None:
    everyone = nodes(3, "0123", 6)
    config = LaunchConfig(nodes=3, run_dir="/r", bind="cores", min_nodes=2)
    before = tasks_of(config, everyone)
    after = tasks_of(config, everyone[1:], known=everyone)
    assert [(task.node, task.slot, task.nodes) for task in after] == [(0, 1, 2), (1, 2, 2)]
    assert [(task.gpus, task.cores, task.threads) for task in after] == [(it.gpus, it.cores, it.threads) for it in before[1:]]


def test_the_smallest_node_sets_the_ranks_of_all() -> None:
    team = [*nodes(1, "0123", host="a"), dataclasses.replace(nodes(2, "01", host="b")[1])]
    assert [task.gpus for task in tasks_of(LaunchConfig(nodes=2, run_dir="/r"), team)] == [("0", "1"), ("0", "1")]


def test_variables_go_along_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_FLAG", "7")
    config = LaunchConfig(run_dir="/r", export=("MY_FLAG", "NOT_SET"), interface="ib0")
    (task,) = tasks_of(config, nodes(1))
    environment = rank_environment(task, 0, {})
    assert (environment["MY_FLAG"], environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("7", "ib0", "ib0")
    assert "NOT_SET" not in environment and "MY_FLAG=7" not in describe([task], "local", "h:1", {})


def test_visible_gpus_are_those_that_the_user_left_visible() -> None:
    assert gpu_ids({"CUDA_VISIBLE_DEVICES": "3, GPU-ab"}) == ["3", "GPU-ab"]
    assert gpu_ids({"CUDA_VISIBLE_DEVICES": ""}) == gpu_ids({"CUDA_VISIBLE_DEVICES": "-1"}) == []


def test_shards_are_built_by_a_rank_for_each_gpu_like_any_job() -> None:
    config = LaunchConfig(job="build-shards", run_dir="/r", nodes=2)
    ranks = {len(gpus): tasks_of(config, nodes(2, gpus)) for gpus in ("", "0123")}
    assert {count: [task.ranks for task in tasks] for count, tasks in ranks.items()} == {0: [1, 1], 4: [2, 2]}


def test_an_installation_folder_does_not_go_before_the_standard_library(tmp_path: Path) -> None:
    assert checkout_path("/a", tmp_path) is None
    (tmp_path / "setup.py").touch()
    assert checkout_path(f"/a:{tmp_path}", tmp_path) == f"{tmp_path}:/a"


def test_a_dry_run_shows_every_command_and_no_inherited_value() -> None:
    config = LaunchConfig(nodes=2, ranks_per_node=2, run_dir="/r/x", overrides=("a=b",))
    tasks = tasks_of(config, nodes(2, cores=8), attempt=3, master_port=20001)
    text = describe(tasks, "local", "127.0.0.1:1", {"API_TOKEN": "hunter2", "PYTHONPATH": "/secret/place"})
    assert "hunter2" not in text and "/secret/place" not in text
    assert text.splitlines()[:2] == ["run folder /r/x, attempt 3", "2 nodes x 2 ranks on CPU, backend local"]
    for rank in range(4):
        (line,) = [line for line in text.splitlines() if line.startswith(f"  rank {rank}: ")]
        assert f"RANK={rank} WORLD_SIZE=4" in line and "OMP_NUM_THREADS=2" in line and line.endswith("-m trainer.main a=b")
    assert text.count("cluster/agent.py") == 2


def test_cores_are_at_least_one() -> None:
    assert usable_cores() >= 1


def test_two_launchers_never_get_one_port() -> None:
    ports = [Port() for _ in range(40)]
    try:
        assert len({port.number for port in ports}) == 40
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", ports[0].number))  # free for rank 0
    finally:
        for port in ports:
            port.close()


def test_exit_codes_name_signals() -> None:
    assert exit_of(3) == (3, None)
    assert exit_of(-9) == (137, "SIGKILL")
    assert exit_of(-64)[0] == 192


def test_json_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert '"x": 1' in (tmp_path / "a.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_this_process_is_not_among_those_found() -> None:
    assert processes_with({"SLOTSTREAM_RUN_DIR": "/no/such/run", "SLOTSTREAM_ATTEMPT": "1"}) == []
