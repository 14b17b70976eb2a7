"""Scores do not depend on how many ranks share the videos; a run in bf16 works end to end."""

from __future__ import annotations

import json
import os
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from data_pipeline.order import World
from tests.integration.ranks import finish, start_ranks
from tests.integration.tiny_run import arguments, lines, make_shards, write_split
from trainer.build import build_model
from trainer.preemption import StopRequest
from trainer.run_folder import read_config
from trainer.train_loop import Training

MERGE_ALL = "objective.ssync.merge.threshold=-1"  # any two slots overlap by more than that


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    data = make_shards(root / "data")
    codes = finish(start_ranks(1, arguments(data, root / "runs", "run", "optim.max_steps=3", MERGE_ALL), root / "logs"))
    assert codes == [0], (root / "logs" / "rank0.err").read_text()[-2000:]
    return root


def evaluate(root, world: int, *more: str, expect: int = 0) -> dict:
    out, logs = root / f"scores{world}.json", root / f"logs{world}"
    codes = finish(start_ranks(world, ["-m", "trainer.evaluate", f"run={root / 'runs' / 'run'}", f"out={out}", *more], logs))
    assert codes == [expect] * world, (logs / "rank0.err").read_text()[-2000:]
    return json.loads(out.read_text()) if expect == 0 else {"error": (logs / "rank0.err").read_text()}


def test_any_number_of_ranks_gives_the_same_scores(begun):
    """Three videos of 5, 3 and 4 frames on 1, 2 and 4 ranks: none lost, none counted twice."""
    one = evaluate(begun, 1)
    assert one["videos"] == 3 and set(one["baselines"]) == {"untrained", "grid", "k_means", "patch_ceiling"}
    assert 0 < one["scores"]["used_slots"] <= 1 and -1 <= one["scores"]["map_agreement"] <= 1
    for world in (2, 4):
        other = evaluate(begun, world)
        assert other["scores"] == pytest.approx(one["scores"], abs=1e-12)
        for name, table in one["baselines"].items():
            assert other["baselines"][name] == pytest.approx(table, abs=1e-12), name


def test_an_older_checkpoint_and_fewer_videos(begun):
    found = evaluate(begun, 1, "step=2", "limit=2", "maps=[attn]", "baselines=false")
    assert (found["step"], found["videos"], found["baselines"]) == (2, 2, {})


def test_merged_slots_are_one_segment(begun):
    """With every slot merged there is one label, which says nothing about the objects; unmerged labels say something."""
    plain = evaluate(begun, 1, "baselines=false")["scores"]
    merged = evaluate(begun, 1, "baselines=false", "merge=true")["scores"]
    assert merged["video_fg_ari"] == pytest.approx(0, abs=1e-12) and merged["attn_video_fg_ari"] == pytest.approx(0, abs=1e-12)
    assert plain["video_fg_ari"] != 0 and plain["video_mbo"] != merged["video_mbo"]


def test_a_step_without_checkpoint_names_those_that_are_there(begun):
    told = evaluate(begun, 1, "step=7", expect=2)["error"]
    assert "step=7" in told and "choose one of 3, 2" in told and "Traceback" not in told


def test_features_of_another_extractor_are_refused(begun, tmp_path):
    write_split(tmp_path, "validation", frames=((4,),), fingerprint="e" * 64)
    told = evaluate(begun, 1, f"root={tmp_path}", expect=2)["error"]
    assert "eeeeeeeeeeee" in told and "ffffffffffff" in told and "Traceback" not in told


def test_scores_into_a_folder_are_refused_before_scoring(begun, tmp_path):
    logs = tmp_path / "logs"
    command = ["-m", "trainer.evaluate", f"run={begun / 'runs' / 'run'}", f"out={tmp_path}"]
    assert finish(start_ranks(1, command, logs)) == [2]
    assert f"out={tmp_path} is a folder" in (logs / "rank0.err").read_text()


def test_evaluations_leave_neither_open_files_nor_threads(begun):
    """A long run evaluates dozens of times in one process."""
    config = read_config(begun / "runs" / "run")
    model = build_model(config.model, 0)
    training = object.__new__(Training)
    training.config, training.world, training.step, training.stop = config, World(), 1, StopRequest()
    training.engine = SimpleNamespace(plain_model=lambda build: model)
    training.observer = SimpleNamespace(evaluated=lambda *values: None, evaluating=nullcontext)
    training.device, training.online = torch.device("cpu"), None

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    training._evaluate()
    before = held()
    for _ in range(3):
        assert training._evaluate().num_videos == 3
        training._baselines()
    assert held() == before


def test_bf16_trains_and_scores(begun):
    more = ["parallel.precision=bf16", "evaluate.at_end=true", "optim.max_steps=4"]
    codes = finish(start_ranks(2, arguments(begun / "data", begun / "runs", "half", *more), begun / "half"))
    assert codes == [0, 0], (begun / "half" / "rank0.err").read_text()[-2000:]
    logged = lines(begun / "runs" / "half" / "metrics.jsonl")
    assert all(0 < line["loss/total"] < 10 for line in logged if "loss/total" in line)
    assert any("metric/video_mbo" in line for line in logged)
