"""The plan against what it plans: parameters, chunks, FLOP and memory of tiny runs; and its command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.case import Case
from cluster.commands import plan as launcher
from cluster.config import LaunchError
from data_pipeline.compose import compose
from data_pipeline.errors import ConfigError
from trainer.config import RunConfig
from trainer.plan import memory, rates, scaling, traffic, work
from trainer.plan.sizes import FLOAT, Layout, Sizes, parameters, sizes_of

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
RANKING = ("objective=srl", "model.projectors=true", "model.patch_maps=true", "objective.srl.group_frames=3")


def sizes(*words: str, nodes: int = 1, ranks: int = 1, gpu: bool = False) -> Sizes:
    run = compose("train", RunConfig, ["experiment=ssync_movi_c", *words])
    return sizes_of(run, Layout(nodes=nodes, ranks_per_node=ranks, gpu=gpu))


def held(one: Sizes, name: str) -> int:
    return sum(part.bytes for part in memory.holdings(one) if part.name == name)


@pytest.mark.parametrize("words", [(), ("model=movi_e",), ("model=ytvis", "model.projectors=true")], ids=str)
def test_parameters_are_those_of_the_network(words):
    from trainer.build import build_model

    one = sizes(*words)
    model = build_model(one.run.model, seed=0)
    assert sum(parameters(one).values()) == sum(value.numel() for value in model.parameters())


def test_chunk_sizes_are_those_of_the_kernels():
    from trainer.kernels import fused_decoder, ranking

    assert memory.CHUNK_ROWS == {"cpu": fused_decoder.CPU_ROWS, "cuda": fused_decoder.CUDA_ROWS}
    assert memory.SRL_BLOCK == {"cpu": ranking.CPU_ROW_BLOCK, "cuda": ranking.CUDA_ROW_BLOCK}


BASE = sizes()
SUPPLY = scaling.Supply(codec="int8", disk=1e9)


@settings(max_examples=40, deadline=None)
@given(clips=st.integers(1, 9), side=st.integers(1, 12), slots=st.integers(2, 13), rows=st.integers(1, 3000))
def test_a_chunk_is_as_large_as_the_kernel_makes_it(clips, side, slots, rows):
    from trainer.kernels.fused_decoder import chunks

    one = replace(BASE, clips=clips, patches=side * side, slots=slots)
    one.run.model.decoder_chunk_rows = rows
    cuts = chunks(one.frames, one.patches, slots, rows)
    largest = max((one.frames.stop - one.frames.start) * (one.patches.stop - one.patches.start) for one in cuts)
    assert memory.chunk_rows(one) == largest * slots


@pytest.mark.parametrize(
    "words",
    [
        ("model.decoder_path=plain",),
        ("model.decoder_path=fused",),
        ("model.decoder_path=fused", "parallel.accumulation=2"),
        ("objective.ssync.merge.source=D",),
        (*RANKING, "objective.srl.decoder_start=0", "objective.srl.encoder_start=0", "optim.max_steps=10"),
    ],
    ids=lambda words: words[-1],
)
def test_flop_are_those_that_torch_counts(words):
    from benchmarks.plan_check import counted_flop, planned

    case = Case(batch=2, frames=3, patches=48, slots=5, width=40, dim=16, hidden=96, settings=words)
    assert planned(case)["flop"] == pytest.approx(counted_flop(case), rel=0.1)


@pytest.mark.parametrize("path", ["fused", "plain"])
def test_memory_is_what_the_allocator_hands_out(path):
    import torch

    from benchmarks.measure import peak_of_tensors
    from benchmarks.plan_check import planned
    from benchmarks.step import prepare

    case = Case(batch=3, frames=4, patches=100, slots=6, width=64, hidden=192, path=path)
    peaks = []
    for _ in range(2):  # the profiler sometimes loses the event of a free, and so counts too much
        step = prepare(case)
        peaks.append(peak_of_tensors(lambda step=step: (step(), step()), torch.device("cpu")).bytes)
    measured = min(peaks) / MIB
    assert planned(case)["memory_mib"] == pytest.approx(measured, rel=0.1)


def test_what_zero_splits_shrinks_with_the_ranks():
    whole, split = sizes("optim.global_batch=8"), sizes("optim.global_batch=64", nodes=2, ranks=4)
    assert held(split, "Adam moments") == pytest.approx(held(whole, "Adam moments") / 8, rel=1e-3)
    assert held(split, "weights") == held(whole, "weights")
    stage0, stage3 = (sizes(f"parallel.zero_stage={stage}", ranks=8) for stage in (0, 3))
    assert held(stage0, "Adam moments") == 2 * FLOAT * sum(parameters(stage0).values())
    assert held(stage3, "weights") == pytest.approx(held(stage0, "weights") / 8, rel=1e-3)


def test_recomputed_frames_bound_what_the_encoder_keeps():
    case = Case(frames=32, patches=64, settings=("model.recompute_frames=4",))
    short, long = (memory.holdings(sizes_of(one.run(), Layout(gpu=False))) for one in (case, Case(frames=32, patches=64)))
    kept, whole = ({one.name: one.bytes for one in held} for held in (short, long))
    assert kept["feature transform, saved"] == whole["feature transform, saved"] // 8
    assert kept["attention logits and their gradient"] == whole["attention logits and their gradient"]


def test_communication():
    alone = sizes("optim.global_batch=4")
    assert set(traffic.communication(alone).values()) == {0.0}
    four = sizes("optim.global_batch=8", "parallel.zero_stage=0", ranks=4)
    numbers = sum(parameters(four).values())
    sent = traffic.communication(four)
    assert sent == {
        "gradients": pytest.approx(2 * 4 * numbers * 3 / 4),
        "weights": 0.0,
        "slots": 4 * 2 * 4 * 11 * 64 * 3,
        "patch sums": 0.0,
    }
    assert traffic.communication(sizes("objective.slot_contrast.scope=rank", ranks=4))["slots"] == 0


def test_ranks_that_share_patches():
    words = ("model.grid=[9,8]", "optim.global_batch=8")
    alone, shared = sizes(*words, ranks=2), sizes(*words, "parallel.patch_ranks=4", ranks=8)
    assert (shared.clips, shared.patches, shared.data_world) == (alone.clips, 3 * 8, 2)
    assert parameters(shared) == parameters(alone)
    assert held(shared, "keys, values and their input") == held(alone, "keys, values and their input") // 3  # 3 of 9 rows at most
    assert held(shared, "prefetch queue on the host") == held(alone, "prefetch queue on the host")  # whole frames are read
    assert traffic.node_bytes(shared, "int8") == 4 * traffic.node_bytes(alone, "int8")
    sent = traffic.communication(shared)
    assert sent["slots"] == traffic.communication(alone)["slots"] and traffic.communication(alone)["patch sums"] == 0
    assert sent["patch sums"] == 4 * shared.clips * shared.iterations * 11 * 65 * 2 * 2 * 3 / 4
    assert all(world % 4 == 0 for world, _ in scaling.binding(shared.run, shared.layout, rates.RATES["h200"], SUPPLY))
    with pytest.raises(ConfigError, match=r"patch_ranks=4 does not divide the 6 ranks"):
        sizes(*words, "parallel.patch_ranks=4", ranks=6)


def test_bytes_of_a_frame():
    one = sizes("model.grid=[3,4]", "model.feature_dim=10", "data.image_size=56")
    assert traffic.frame_bytes(one, "float16") == 3 * 4 * 10 * 2
    assert traffic.frame_bytes(one, "int8") == 3 * 4 * (10 + 2)
    assert traffic.frame_bytes(one, "frames") == 56 * 56 * 3


def test_dataset_is_what_the_shards_say(tmp_path):
    folder = tmp_path / "movi_c" / "train"
    folder.mkdir(parents=True)
    one = sizes(f"data.root={folder.parent}")
    assert traffic.find_dataset(one, None) == (9737 * 24, "int8", "9,737 videos of 24 frames, no shards yet")
    (folder / "index.json").write_text(json.dumps({"samples": [{"frames": 7}, {"frames": 5}], "features": {"codec": "float16"}}))
    assert traffic.find_dataset(one, None) == (12, "float16", str(folder / "index.json"))
    assert traffic.find_dataset(sizes("data.root=elsewhere"), None) is None


def test_more_ranks_take_less_time_until_something_binds():
    times = [scaling.step_time(sizes(ranks=ranks, gpu=True), rates.RATES["h200"], SUPPLY) for ranks in (1, 4, 16)]
    assert times[0].compute > times[1].compute > times[2].compute
    assert times[0].communication == 0 < times[1].communication
    assert times[0].data == pytest.approx(times[2].data)  # of one node, however many ranks share it
    assert times[2].step == max(times[2].compute + times[2].communication, times[2].data)


@pytest.mark.parametrize(
    ("binds", "expected"),
    [
        ([(1, "compute"), (2, "compute"), (4, "communication"), (8, "data")], (4, "data takes longer than computing")),
        ([(1, "data"), (2, "compute"), (4, "communication")], (4, "communication takes longer than computing")),
        ([(1, "data"), (2, "compute")], (2, "a rank needs a clip of the 2")),
        ([(1, "data"), (2, "data")], (1, "data takes longer than computing")),
    ],
)
def test_where_scaling_stops(binds, expected):
    ranks, why = scaling.stops_scaling(binds, 2)
    assert ranks == expected[0]
    assert why.split()[0] in ("a", "data", "communication") and why.endswith(expected[1].split(" ", 1)[1])


def test_every_part_has_work():
    parts = work.step_work(sizes("optim.global_batch=4"), online=True)
    assert {"frozen ViT forward", "decoder backward", "losses", "Adam"} <= set(parts)
    assert all(part.moved > 0 for part in parts.values())
    # ViT-S/14 at 336 pixels: about 7.8 TFLOP for 256 frames
    assert parts["frozen ViT forward"].flop * 16 == pytest.approx(7.8e12, rel=0.05)


def plan(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "cluster/launch.py", "plan", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env=os.environ)


def test_command_prints_and_starts_nothing(tmp_path):
    words = ("--nodes", "2", "--gpus-per-node=4", "experiment=ssync_movi_c", f"runs={tmp_path / 'runs'}")
    as_text, as_json = plan(*words), plan(*words, "--json")
    assert as_text.returncode == as_json.returncode == 0, as_text.stderr + as_json.stderr
    found = json.loads(as_json.stdout)
    assert found["layout"]["world"] == 8 and found["shape"]["B"] == 16 and found["time"]["step"] > 0
    assert all(one["name"] in as_text.stdout for one in [*found["memory"]["tensors"], *found["work"]["parts"]])
    assert as_text.stdout.splitlines()[-1].startswith(f"stops scaling at {found['stops_scaling']['ranks']} ranks")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--gpus-per-node", "8", "experiment=ssync_movi"], "ssync_movi_e"),
        (["--gpus-per-node", "8", "--rate", "h20", "experiment=ssync_movi_c"], "h200"),
        (["--gpus-per-node", "eight"], "eight"),
        (["--nodes", "0", "--gpus-per-node", "1", "experiment=ssync_movi_c"], "--nodes"),
        (["--nodes", "40", "--gpus-per-node", "8", "experiment=ssync_movi_c"], "optim.global_batch"),
        (["--gpus-per-node", "1", "--disk", "0", "experiment=ssync_movi_c"], "--disk"),
        (["--gpus-per-node", "1", "--codec", "zip", "experiment=ssync_movi_c"], "int8"),
        (["--gpus-per-node", "1", "--measure", "--rate", "h100", "experiment=ssync_movi_c"], "--rate h100"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(words, named):
    result = plan(*words)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and named in result.stderr
    assert not result.stdout


def test_planner_knows_no_torch():
    code = "import sys, trainer.plan.__main__ as p; p.main(['experiment=ssync_movi_c']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False).returncode == 0


def test_launcher_words():
    assert launcher.is_plan(["plan"]) and launcher.is_plan(["--nodes", "2", "plan", "experiment=x"])
    assert not launcher.is_plan(["--runs", "plan", "experiment=x"]) and not launcher.is_plan(["name=plan"])
    assert launcher.planner_words(["--gpus-per-node", "0", "a=1"], {}) == ["--ranks-per-node", "1", "--cpu", "a=1"]
    assert launcher.planner_words(["a=1"], {"CUDA_VISIBLE_DEVICES": "0,1"}) == ["--ranks-per-node", "2", "a=1"]
    with pytest.raises(LaunchError, match="a GPU serves one rank"):
        launcher.planner_words(["--gpus-per-node", "2", "--ranks-per-node=4"], {})


def test_rates_of_the_user():
    found = rates.find_rates("500e12,3e12")
    assert (found.matmul_half, found.memory) == (500e12, 3e12)
    with pytest.raises(ConfigError, match="500e12,3e12"):
        rates.find_rates("500e12,-1")
