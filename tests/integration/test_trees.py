"""Genuine dataset trees, from the command line: build -> inspect -> verify -> train 20 steps -> evaluate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.features.vit import DinoVit, VitShape
from tests.integration.ranks import ROOT

TREES = ROOT / "tests" / "data"


def command(*words: str, expect: int = 0) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == expect, result.stdout[-2000:] + result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory) -> Path:
    """A small DINOv2 with random weights, saved as Meta saves theirs."""
    torch.manual_seed(0)
    model = DinoVit(VitShape(width=64, depth=2, heads=1, hidden=256))
    path = tmp_path_factory.mktemp("weights") / "tiny_dinov2.pth"
    torch.save(model.state_dict() | {"mask_token": torch.zeros(1, 64)}, path)
    return path


def build(out: Path, vit_file: Path, *more: str) -> None:
    command("-m", "data_pipeline.build", f"out={out}", "features=dinov2", f"features.weights={vit_file}", "workers=1", *more)


def train_arguments(data: Path, runs: Path, grid: int) -> list[str]:
    return [
        f"data.root={data}", "data.features=dinov2", f"data.image_size={14 * grid}", "model.feature_dim=64",
        f"model.grid=[{grid},{grid}]", "model.num_slots=5", "model.slot_dim=16", "model.decoder_hidden=[32,32]",
        "objective=ssync", "optim.max_steps=20", "optim.global_batch=4", "optim.warmup_steps=2", "optim.decay_steps=20",
        f"runs={runs}", "name=tree", "observe.log_every=5",
    ]  # fmt: skip


def train_and_evaluate(data: Path, runs: Path, grid: int, *more: str, videos: int) -> dict:
    command(
        "cluster/launch.py",
        "--nodes",
        "1",
        "--ranks-per-node",
        "2",
        "--backend",
        "local",
        *train_arguments(data, runs, grid),
        *more,
    )
    run = runs / "tree"
    assert (run / "DONE").is_file() and (run / "report" / "index.html").is_file()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/total" in line] == [5, 10, 15, 20]
    assert any("loss/ssync_boundary" in line for line in lines)
    result = command("-m", "trainer.evaluate", f"run={run}")
    assert "ceiling of the patch grid" in result.stdout
    scores = json.loads((run / "evaluation.json").read_text())
    assert scores["videos"] == videos and scores["step"] == 20
    logged = next(line for line in reversed(lines) if "metric/video_mbo" in line)
    # the run scored with two ranks, the command with one
    assert scores["scores"]["video_mbo"] == pytest.approx(logged["metric/video_mbo"], abs=1e-6)
    assert 0 < scores["scores"]["video_mbo"] < scores["baselines"]["patch_ceiling"]["video_mbo"] <= 1
    return scores


def test_movi(tmp_path, vit_file):
    data = tmp_path / "movi"
    build(
        data,
        vit_file,
        "source=movi",
        f"root={TREES / 'movi_tfds_tiny'}",
        "splits=[train]",
        "source.image_size=42",
        "samples_per_shard=2",
    )
    assert "3" in command("-m", "data_pipeline.inspect", str(data)).stdout
    command("-m", "data_pipeline.verify", str(data))
    scores = train_and_evaluate(data, tmp_path / "runs", 3, "data.val_split=train", videos=3)
    assert "video_ari" in scores["scores"], "MOVi's background is annotated"


def test_ytvis(tmp_path, vit_file):
    data = tmp_path / "ytvis"
    root = f"root={TREES / 'ytvis_tiny'}"
    build(
        data,
        vit_file,
        "source=ytvis",
        root,
        "source.num_validation=2",
        "source.image_size=56",
        "source.train_views=[center,crop0]",
    )
    command("-m", "data_pipeline.verify", str(data))
    train_and_evaluate(data, tmp_path / "runs", 4, "data.views=[center,crop0]", videos=2)


def test_features_of_another_model_are_refused(tmp_path, vit_file):
    data = tmp_path / "movi"
    build(data, vit_file, "source=movi", f"root={TREES / 'movi_tfds_tiny'}", "splits=[train]", "source.image_size=42")
    arguments = train_arguments(data, tmp_path / "runs", 3)
    arguments[1] = "data.features=dinov2_vits14"
    result = command("-m", "trainer.main", *arguments, "data.val_split=train", expect=2)
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "dinov2_vits14" in told[0] and "dinov2" in told[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["source=movi", "root=/nowhere"], ["/nowhere"]),
        (["source=ytvis", "root=/nowhere"], ["/nowhere"]),
        (["source=moviee", "root=x"], ["moviee", "movi_e"]),
        (["source=movi", f"root={TREES / 'movi_tfds_tiny'}", "codec=float17"], ["float17", "float16"]),
        (
            ["source=movi", f"root={TREES / 'movi_tfds_tiny'}", "splits=[train]", "features.weights=/nowhere.pth"],
            ["/nowhere.pth"],
        ),
    ],
)
def test_a_mistake_in_a_build_is_one_line(tmp_path, words, expected):
    result = command("-m", "data_pipeline.build", f"out={tmp_path / 'out'}", "features=dinov2", *words, expect=2)
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in expected:
        assert word in told[0], told[0]
    assert not list(tmp_path.rglob("index.json"))


def test_a_truncated_video_is_counted_and_skipped_up_to_the_share(tmp_path, vit_file):
    import shutil

    tree = tmp_path / "tree"
    shutil.copytree(TREES / "ytvis_tiny", tree)
    image = tree / "train" / "JPEGImages" / "5f6a7b8c9d" / "00005.jpg"
    image.write_bytes(image.read_bytes()[:300])
    arguments = ["-m", "data_pipeline.build", "features=dinov2", f"features.weights={vit_file}", "source=ytvis", f"root={tree}"]
    arguments += ["source.num_validation=1", "source.image_size=28", "splits=[train]", "workers=1"]
    refused = command(*arguments, f"out={tmp_path / 'strict'}", expect=2)
    assert "5f6a7b8c9d" in refused.stderr and not list((tmp_path / "strict").rglob("index.json"))
    command(*arguments, f"out={tmp_path / 'lenient'}", "max_skip_fraction=0.3")
    index = json.loads((tmp_path / "lenient" / "train" / "index.json").read_text())
    assert [entry["key"] for entry in index["skipped"]] == ["5f6a7b8c9d"] and len(index["samples"]) == 3
