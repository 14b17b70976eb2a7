"""Time of an update, what binds it and where more ranks stop helping. Sizes and rates in, seconds out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config import RunConfig
from trainer.plan.rates import Rates
from trainer.plan.sizes import Layout, Sizes, sizes_of
from trainer.plan.traffic import communication, node_bytes
from trainer.plan.work import Work, step_work

MOST_RANKS = 4096


@dataclass(frozen=True, kw_only=True)
class Supply:
    """What stands around the devices. Units: bytes/s of one node, seconds."""

    codec: str  # how features come: a codec of the shards, or "frames" for features made in the loop
    link: float = 50e9  # to other nodes, each way
    disk: float = 3e9  # reading shards
    latency: float = 10e-6  # of one message


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of an update. Data is read ahead, so a step lasts as long as the slower of computing + talking and reading."""

    compute: float
    communication: float
    data: float

    @property
    def step(self) -> float:
        return max(self.compute + self.communication, self.data)

    @property
    def binds(self) -> str:
        return max(("compute", "communication", "data"), key=lambda name: getattr(self, name))


def work_seconds(work: Work, rates: Rates, half: bool) -> float:
    """Products, then elementwise passes; never less than its calls take one after the other."""
    matmul = rates.matmul_half if half else rates.matmul_float
    return max(work.flop / matmul + work.moved / rates.memory, work.calls * rates.call)


def step_time(sizes: Sizes, rates: Rates, supply: Supply) -> StepTime:
    parts = step_work(sizes, online=supply.codec == "frames")
    return StepTime(
        compute=sum(work_seconds(work, rates, sizes.half) for work in parts.values()),
        communication=_talk_seconds(sizes, rates, supply),
        data=node_bytes(sizes, supply.codec) / supply.disk,
    )


def _talk_seconds(sizes: Sizes, rates: Rates, supply: Supply) -> float:
    """A ring crosses each node's link once each way: the slowest link sets the pace. Six collectives of a few messages each."""
    layout = sizes.layout
    if layout.world == 1:
        return 0.0
    pace = rates.node_link if layout.nodes == 1 else min(rates.node_link, supply.link)
    return sum(communication(sizes).values()) / pace + 6 * 2 * math.log2(layout.world) * supply.latency


def layouts(ranks_per_node: int, gpu: bool) -> list[Layout]:
    """1, 2, 4 ... ranks of a node, then 1, 2, 3 ... nodes (in steps of a sixteenth above 16)."""
    found, ranks = [], 1
    while ranks < ranks_per_node:
        found.append(Layout(nodes=1, ranks_per_node=ranks, gpu=gpu))
        ranks *= 2
    nodes = 1
    while nodes * ranks_per_node <= MOST_RANKS:
        found.append(Layout(nodes=nodes, ranks_per_node=ranks_per_node, gpu=gpu))
        nodes += max(1, nodes // 16)
    return found


def binding(run: RunConfig, layout: Layout, rates: Rates, supply: Supply) -> list[tuple[int, str]]:
    """What binds at each world size that the global batch allows, nodes being filled one after the other."""
    sharing = run.parallel.patch_ranks
    allowed = [
        one
        for one in layouts(layout.ranks_per_node, layout.gpu)
        if one.ranks_per_node % sharing == 0 and one.world // sharing <= run.optim.global_batch
    ]
    return [(one.world, step_time(sizes_of(run, one), rates, supply).binds) for one in allowed]


def stops_scaling(binds: list[tuple[int, str]], global_batch: int) -> tuple[int, str]:
    """(ranks, why): the smallest world from which on something else takes longer than computing, with the same global batch.

    Before it another world may be bound by data, where a single node's reading serves many ranks: more nodes cure that.
    """
    last, why = binds[-1]
    if why == "compute":
        return last, f"a rank needs a clip of the {global_batch}" if last < MOST_RANKS else "nothing binds up to here"
    for ranks, what in reversed(binds):
        if what == "compute":
            break
        last, why = ranks, what
    return last, f"{why} takes longer than computing"
