"""Command: what order training will read shards in, and what that asks of the disks. `python -m data_pipeline.plan SHARDS`

Comes in: a split's index, a global batch, ranks and nodes. Goes out: steps per epoch, how well shuffled, how local, how dear.
Only the index is read; no shard is opened.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.compose import run_command
from data_pipeline.errors import DataError
from data_pipeline.order import Order, World, lane_groups, rank_places
from data_pipeline.progress import format_bytes
from data_pipeline.shards import DatasetIndex

QUALITY_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Locality:
    """Of the node that needs most. Units: shards in a run of steps, mean over the epoch; shards and bytes in its cache."""

    shards_in_steps: float
    shards_in_epoch: int
    cached_shards: int
    cached_bytes: int


def main(argv: list[str]) -> int:
    options = parse(argv)
    index = _index_of(options.shards)
    order = Order(eligible_sizes(index, options.clip_len), options.seed, options.block_shards, options.lanes)
    print("\n".join(describe(index, order, options)))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.plan", description="Show in what order training will read shards, and what that costs."
    )
    parser.add_argument("shards", help="folder or URL of a build (its train split is taken), or of one of its splits")
    parser.add_argument("--global-batch", type=int, default=64, help="clips of a step over all ranks (default: 64)")
    parser.add_argument("--ranks", type=int, default=1, help="processes that train (default: 1)")
    parser.add_argument("--nodes", type=int, default=1, help="machines they run on; must divide --ranks (default: 1)")
    parser.add_argument("--clip-len", type=int, default=4, help="data.clip_len (default: 4)")
    parser.add_argument("--lanes", type=int, default=240, help="data.lanes (default: 240)")
    parser.add_argument("--block-shards", type=int, default=8, help="data.block_shards (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0)")
    parser.add_argument("--steps", type=int, default=QUALITY_STEPS, help="steps of a run for locality (default: 10)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs whose order is hashed (default: 2)")
    options = parser.parse_args(argv)
    for name in ("global_batch", "ranks", "nodes", "clip_len", "lanes", "block_shards", "steps", "epochs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}={getattr(options, name)}; it must be at least 1")
    if options.ranks % options.nodes:
        parser.error(f"--nodes={options.nodes}; it must divide --ranks={options.ranks}")
    return options


def describe(index: DatasetIndex, order: Order, options: argparse.Namespace) -> list[str]:
    """Lines for a person."""
    began = time.perf_counter()
    order.epoch(0)
    seconds = time.perf_counter() - began
    sizes = [int(shard["bytes"]) for shard in index.shards]
    local = locality(order, sizes, options.global_batch, options.ranks, options.nodes, options.steps)
    groups = lane_groups(options.global_batch, options.ranks, order.lanes)
    taken = f"{groups} groups of {options.ranks // groups} ranks keep to lanes of their own"
    lines = {
        "samples": f"{order.num_samples} of {len(index.samples)} have {options.clip_len} frames, in {len(index.shards)} shards",
        "steps": f"{-(-order.num_samples // options.global_batch)} an epoch of {options.global_batch} clips",
        "order": f"{order.rules}; {taken}",
        "shuffle quality": f"{shuffle_quality(order, options.global_batch):.3f} (1: as many shards meet in {QUALITY_STEPS} steps "
        "as in a full permutation)",
        "locality": f"a node touches {local.shards_in_steps:.1f} shards in {options.steps} steps, "
        f"{local.shards_in_epoch} in an epoch",
        "cache": f"{local.cached_shards} shards, {format_bytes(local.cached_bytes)} a node, to read no shard twice in an epoch",
        "planning": f"{seconds * 1e3:.1f} ms an epoch",
    }
    hashes = [f"  epoch {epoch:<10} {order_hash(order, epoch)}" for epoch in range(options.epochs)]
    return [f"  {name:<16} {text}" for name, text in lines.items()] + hashes


def eligible_sizes(index: DatasetIndex, clip_len: int) -> list[int]:
    """Samples of each shard that are as long as a clip. Raises DataError when there are none."""
    shards = [sample.shard for sample in index.samples if sample.frames >= clip_len]
    if not shards:
        raise DataError(f"none of {len(index.samples)} videos has {clip_len} frames; at least one must; change --clip-len")
    return np.bincount(shards, minlength=len(index.shards)).tolist()


def shuffle_quality(order: Order, global_batch: int, epoch: int = 0) -> float:
    """How many different shards a run of ten steps draws on, as a share of what a full permutation would; 1 at most.

    A run's samples come from few shards when batches are taken from one shard after another, and also when neighbouring batches
    keep to the same shards: both are what a shuffle is to prevent. Mean over the whole runs of an epoch.
    """
    shards = order.shards_of(order.epoch(epoch))
    length = min(QUALITY_STEPS * global_batch, order.num_samples)
    runs = np.sort(shards[: len(shards) // length * length].reshape(-1, length), axis=1)
    found = 1 + np.count_nonzero(np.diff(runs, axis=1), axis=1).mean()
    # Drawing `length` of all samples without putting back leaves a shard out with this probability.
    rest = order.num_samples - order.shard_sizes[order.shard_sizes > 0]
    missed = np.array([_share_left_out(int(other), order.num_samples, length) for other in np.unique(rest)])
    expected = float((1 - missed[np.searchsorted(np.unique(rest), rest)]).sum())
    return float(min(1.0, found / expected))


def _share_left_out(others: int, total: int, drawn: int) -> float:
    """Probability that `drawn` of `total` samples, none twice, all lie among `others`."""
    if drawn > others:
        return 0.0
    taken = np.arange(drawn)
    return float(np.exp(np.log((others - taken) / (total - taken)).sum()))


def locality(order: Order, shard_bytes: list[int], global_batch: int, ranks: int, nodes: int, steps: int) -> Locality:
    """What the node with most shards touches, over the whole steps of the first epoch."""
    shards = order.shards_of(order.epoch(0))
    num_steps = max(1, order.num_samples // global_batch)
    worst = []
    for node in range(nodes):
        members = range(node * ranks // nodes, (node + 1) * ranks // nodes)
        places = np.concatenate([np.array(rank_places(global_batch, World(rank, ranks), order.lanes), int) for rank in members])
        if len(places):
            where = (np.arange(num_steps)[:, None] * global_batch + places) % order.num_samples
            worst.append(_node_locality(shards[where], np.asarray(shard_bytes, np.int64), steps))
    return Locality(
        shards_in_steps=max(node.shards_in_steps for node in worst),
        shards_in_epoch=max(node.shards_in_epoch for node in worst),
        cached_shards=max(node.cached_shards for node in worst),
        cached_bytes=max(node.cached_bytes for node in worst),
    )


def _node_locality(shards: np.ndarray, shard_bytes: np.ndarray, steps: int) -> Locality:
    """Shapes: shards (steps of the epoch, clips of the node). A shard is held from its first use to its last."""
    num_steps = len(shards)
    run = min(steps, num_steps)
    runs = np.sort(shards[: num_steps // run * run].reshape(num_steps // run, -1), axis=1)
    used, first = np.unique(shards, return_index=True)
    last = shards.size - 1 - np.unique(shards.reshape(-1)[::-1], return_index=True)[1]
    begin, end = first // shards.shape[1], last // shards.shape[1] + 1
    held = [
        np.bincount(begin, weights, num_steps + 1) - np.bincount(end, weights, num_steps + 1)
        for weights in (None, shard_bytes[used])
    ]
    return Locality(
        shards_in_steps=float(1 + np.count_nonzero(np.diff(runs, axis=1), axis=1).mean()),
        shards_in_epoch=len(used),
        cached_shards=int(np.cumsum(held[0]).max()),
        cached_bytes=int(np.cumsum(held[1]).max()),
    )


def order_hash(order: Order, epoch: int) -> str:
    """Stands for the sequence of an epoch's sample ids: equal on every machine."""
    import hashlib

    return hashlib.sha256(order.epoch(epoch).astype("<i8").tobytes()).hexdigest()[:16]


def _index_of(shards: str) -> DatasetIndex:
    from data_pipeline.store import find_splits, load_index

    splits = find_splits(shards)
    return load_index(next((split for split in splits if Path(split).name == "train"), splits[0]))


if __name__ == "__main__":
    sys.exit(run_command(main))
