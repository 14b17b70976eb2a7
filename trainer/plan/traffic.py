"""Bytes that travel: features to a node, gradients between ranks, and what the dataset takes on disk. Sizes in, bytes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from trainer.plan.sizes import FLOAT, Sizes, parameters

# Bytes of a feature by codec; int8 has a float16 scale for each patch besides (see data_pipeline/codec.py).
CODEC_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0}
SCALE_BYTES = {"int8": 2.0}  # per patch
DEFAULT_CODEC = "int8"  # of data_pipeline.build
# (videos, frames of a video) of training sets, for a plan before their shards are there
KNOWN_DATASETS = {"movi_c": (9737, 24), "movi_e": (9749, 24), "coco2017": (118287, 1), "synthetic": (400, 16)}


class Dataset(NamedTuple):
    frames: int  # of all videos, once
    codec: str
    source: str  # where this is known from


def find_dataset(sizes: Sizes, codec: str | None) -> Dataset | None:
    """What the shards say, else what is known by name; None: neither."""
    data = sizes.run.data
    index = Path(data.root) / data.train_split / "index.json"
    try:
        content = json.loads(index.read_text())
        frames = sum(int(sample["frames"]) for sample in content["samples"])
        return Dataset(frames, codec or str(content["features"]["codec"]), str(index))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    name = Path(data.root).name
    if name not in KNOWN_DATASETS:
        return None
    videos, length = KNOWN_DATASETS[name]
    return Dataset(videos * length, codec or data.codec or DEFAULT_CODEC, f"{videos:,} videos of {length} frames, no shards yet")


def frame_bytes(sizes: Sizes, codec: str) -> float:
    """A frame's features as stored, or with codec="frames" (online features) its pixels as the ViT takes them: the most that can
    travel, as shards hold them encoded and at their own size."""
    if codec == "frames":
        return 3.0 * sizes.run.data.image_size**2
    return sizes.whole_frame * (sizes.width * CODEC_BYTES[codec] + SCALE_BYTES.get(codec, 0.0))


def stored_bytes(sizes: Sizes, codec: str) -> float:
    """Bytes of one feature as stored."""
    return frame_bytes(sizes, codec) / (sizes.whole_frame * sizes.width)


def node_bytes(sizes: Sizes, codec: str) -> float:
    """Bytes of features (or frames) that a node reads for an update. Ranks that share clips read the same whole frames."""
    return frame_bytes(sizes, codec) * sizes.frames * sizes.micro_batches * sizes.layout.ranks_per_node


def communication(sizes: Sizes) -> dict[str, float]:
    """Bytes that a rank sends in an update, by what they are for.

    A ring all-reduce of n bytes sends 2 (W-1)/W n, a gather or a reduce-scatter half of it. DeepSpeed's stages 1 and 2
    all-reduce the gradients and gather the updated weights; stage 3 gathers weights for forward and backward. Ranks that share
    clips add up what slot attention sums over patches, forward and backward.
    """
    world, stage = sizes.layout.world, sizes.run.parallel.zero_stage
    if world == 1:
        return {"gradients": 0.0, "weights": 0.0, "slots": 0.0, "patch sums": 0.0}
    once = FLOAT * sum(parameters(sizes).values()) * (world - 1) / world
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * sizes.micro_batches + (sizes.micro_batches if sizes.micro_batches > 1 else 0)}[stage]
    reductions = {0: 2, 1: 2, 2: 2, 3: 1}[stage] * (sizes.micro_batches if stage >= 2 else 1)
    clips = sizes.clips * sizes.micro_batches
    slots = FLOAT * clips * sizes.clip_len * sizes.slots * sizes.dim * (sizes.data_world - 1)
    sharing = sizes.run.parallel.patch_ranks
    sums = FLOAT * clips * sizes.iterations * sizes.slots * (sizes.dim + 1) * 2 * 2 * (sharing - 1) / sharing
    contrast = sizes.run.objective.slot_contrast
    coupled = contrast.weight > 0 and contrast.scope == "global"
    sent = {"gradients": reductions * once, "weights": gathers * once, "slots": slots if coupled else 0.0}
    return sent | {"patch sums": sums}
