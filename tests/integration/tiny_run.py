"""A run small enough to be started many times: a few hand-made shards, a model of a few thousand weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from tiny_shards import write_split


def make_shards(root: Path, codec: str = "float16") -> Path:
    write_split(root, "train", frames=((4, 6, 5), (8, 4), (4,)), codec=codec)
    write_split(root, "validation", frames=((5, 3), (4,)), codec=codec)
    return root


def arguments(data: Path, runs: Path, name: str, *more: str) -> list[str]:
    """Overrides of trainer.main; ten steps with every term active from step 3 on."""
    fixed = {
        "data.root": data, "data.features": "fake", "data.image_size": 12, "data.clip_len": 2,
        "model.feature_dim": 5, "model.grid": "[2,3]", "model.num_slots": 4, "model.slot_dim": 8,
        "model.decoder_hidden": "[12,12]",
        "objective": "ssync", "objective.ssync.merge.threshold": 0.9, "optim.max_steps": 10, "optim.global_batch": 4,
        "optim.lr": 0.004,
        "optim.warmup_steps": 2, "optim.decay_steps": 20, "runs": runs, "name": name, "observe.log_every": 1,
        "checkpoint.every_steps": 1, "checkpoint.keep": 2, "evaluate.every_steps": 0, "evaluate.at_end": "false",
        "observe.record_order": "true",
        "observe.metrics": "false", "observe.report": "false",
    }  # fmt: skip
    names = {item.split("=")[0] for item in more}
    return ["-m", "trainer.main", *(f"{key}={value}" for key, value in fixed.items() if key not in names), *more]


def weights(run: Path, step: int) -> dict[str, np.ndarray]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def moments(run: Path, step: int) -> dict[str, np.ndarray]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "optimizer.safetensors")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss/total"] for line in lines(run / "metrics.jsonl") if "loss/total" in line}


def applied_ids(run: Path, world: int) -> dict[int, list[int]]:
    """Sample ids of every applied update, in the order of the stream."""
    merged: dict[int, list[tuple[int, int]]] = {}
    for rank in range(world):
        for line in lines(run / "order" / f"rank{rank}.jsonl"):
            merged.setdefault(line["step"], []).extend(zip(line["positions"], line["ids"], strict=True))
    return {step: [sample for _, sample in sorted(pairs)] for step, pairs in merged.items()}
