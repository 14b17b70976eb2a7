"""What runs where: ranks, environments, devices, commands, and the text of a dry run."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import LaunchConfig, LaunchError
from cluster.layout import (
    NodeTask,
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
    local=True,
    command=("-m", "trainer.main", "a=b c", "name='q'"),
)


def test_a_task_travels_as_a_command_line() -> None:
    for task in (TASK, dataclasses.replace(TASK, gpus=(), local=False, command=("x.py", "--", "--node"))):
        assert NodeTask.parse(task.agent_command()[2:]) == task


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


@given(nodes=st.integers(1, 5), ranks=st.integers(1, 4), cores=st.integers(1, 64))
def test_ranks_are_numbered_without_gap_and_share_the_cores(nodes: int, ranks: int, cores: int) -> None:
    config = LaunchConfig(nodes=nodes, ranks_per_node=ranks, run_dir="/r")
    tasks = node_tasks(config, attempt=1, master_port=1, gpus=[], cores=cores)
    environments = [rank_environment(task, local, {}) for task in tasks for local in range(task.ranks)]
    assert [int(e["RANK"]) for e in environments] == list(range(nodes * ranks))
    assert {int(e["WORLD_SIZE"]) for e in environments} == {nodes * ranks}
    threads = [int(e["OMP_NUM_THREADS"]) for e in environments]
    assert min(threads) >= 1 and (sum(threads) <= cores or max(threads) == 1)


@given(nodes=st.integers(1, 4), there=st.integers(0, 9), asked=st.none() | st.integers(0, 3), ranks=st.none() | st.integers(1, 3))
def test_no_gpu_is_given_to_two_nodes(nodes: int, there: int, asked: int | None, ranks: int | None) -> None:
    if asked and ranks and asked != ranks:
        return
    config = LaunchConfig(nodes=nodes, gpus_per_node=asked, ranks_per_node=ranks, run_dir="/r")
    ids = [str(10 + gpu) for gpu in range(there)]
    if asked is not None and asked * nodes > there:
        with pytest.raises(LaunchError, match=f"this machine has {there}"):
            node_tasks(config, attempt=1, master_port=1, gpus=ids, cores=2)
        return
    tasks = node_tasks(config, attempt=1, master_port=1, gpus=ids, cores=2)
    given_out = [gpu for task in tasks for gpu in task.gpus]
    assert len(set(given_out)) == len(given_out) and set(given_out) <= set(ids)
    assert all(task.gpus == () or len(task.gpus) == task.ranks for task in tasks)


def test_gpus_are_used_when_there_are_enough() -> None:
    assert gpus_of_a_node(LaunchConfig(nodes=2), 8) == 4
    assert gpus_of_a_node(LaunchConfig(nodes=2, ranks_per_node=3), 8) == 3
    assert gpus_of_a_node(LaunchConfig(nodes=2, ranks_per_node=3), 5) == 0
    assert gpus_of_a_node(LaunchConfig(nodes=2, gpus_per_node=0), 8) == 0


def test_visible_gpus_are_those_that_the_user_left_visible() -> None:
    assert gpu_ids({"CUDA_VISIBLE_DEVICES": "3, GPU-ab"}) == ["3", "GPU-ab"]
    assert gpu_ids({"CUDA_VISIBLE_DEVICES": ""}) == gpu_ids({"CUDA_VISIBLE_DEVICES": "-1"}) == []


def test_shards_are_built_by_a_rank_for_each_gpu_like_any_job() -> None:
    config = LaunchConfig(job="build-shards", run_dir="/r", nodes=2)
    ranks = {len(gpus): node_tasks(config, attempt=1, master_port=1, gpus=gpus, cores=2) for gpus in ([], ["0", "1", "2", "3"])}
    assert {count: [task.ranks for task in tasks] for count, tasks in ranks.items()} == {0: [1, 1], 4: [2, 2]}


def test_an_installation_folder_does_not_go_before_the_standard_library(tmp_path: Path) -> None:
    assert checkout_path("/a", tmp_path) is None
    (tmp_path / "setup.py").touch()
    assert checkout_path(f"/a:{tmp_path}", tmp_path) == f"{tmp_path}:/a"


def test_a_dry_run_shows_every_command_and_no_inherited_value() -> None:
    tasks = node_tasks(LaunchConfig(nodes=2, ranks_per_node=2, run_dir="/r/x", overrides=("a=b",)), attempt=3, master_port=20001,
                       gpus=[], cores=8)  # fmt: skip
    text = describe(tasks, "local", {"API_TOKEN": "hunter2", "PYTHONPATH": "/secret/place"})
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
