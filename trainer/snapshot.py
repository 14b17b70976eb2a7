"""Snapshot: an engine on many ranks goes in, full float32 weights and Adam moments in rank 0's host memory come out.

The tensors of a file lie in one block of memory, in the order of the file, and the block is used again for the next snapshot.
Pieces that ranks hold of a tensor are gathered in a few large operations, not one for each tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import distributed
from trainer.engine import MOMENTS, Engine, Piece

GATHER_NUMBERS = 2**25  # float32 numbers that rank 0 receives at once, from all ranks together: 128 MiB
Place = tuple[str, int, int]  # tensor, first number in it, how many


class HostTensors:
    """Named float32 tensors in one block of host memory, which is a safetensors file's content after `header`."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], pinned: bool = False) -> None:
        self.shapes = {name: tuple(shapes[name]) for name in sorted(shapes)}
        self.memory = torch.empty(sum(map(math.prod, self.shapes.values())), dtype=torch.float32, pin_memory=pinned)
        self.tensors: dict[str, Tensor] = {}
        described: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in self.shapes.items():
            begin, end = end, end + math.prod(shape)
            self.tensors[name] = self.memory[begin:end].view(shape)
            described[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [4 * begin, 4 * end]}
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + 4 * self.memory.numel()

    def content(self) -> memoryview:
        """What follows the header in the file."""
        return self.memory.numpy().data.cast("B")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint holds besides its state. Valid until the next snapshot is taken."""

    weights: HostTensors
    moments: HostTensors  # named exp_avg/<tensor> and exp_avg_sq/<tensor>

    @property
    def num_bytes(self) -> int:
        return self.weights.num_bytes + self.moments.num_bytes


class SnapshotTaker:
    """Takes snapshots of one engine. Rank 0's host memory holds one of them: 12 bytes for each number of the model."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_main = dist.get_rank() == 0
        self._layouts: dict[tuple[str, ...], list[list[Place]]] = {}
        self._weights: HostTensors | None = None
        self._moments: HostTensors | None = None
        self._sent = torch.empty(0, device=engine.device)
        self._received: list[Tensor] = []

    def take(self) -> Snapshot | None:
        """The engine's state now; None on ranks other than 0. Collective. Overwrites the snapshot before it."""
        shapes = self._engine.shapes()
        pinned = self._engine.device.type == "cuda"
        if self._is_main:
            self._weights = self._weights or HostTensors(shapes, pinned)
        self._collect({"weight": self._engine.pieces("weight")}, self._weights)
        held = {key: self._engine.pieces(key) for key in MOMENTS}
        if self._is_main:
            wanted = {f"{key}/{name}": shapes[name] for key in MOMENTS for name in self._names(held[key], shapes)}
            if self._moments is None or set(self._moments.shapes) != set(wanted):
                self._moments = HostTensors(wanted, pinned)
        self._collect(held, self._moments)
        if pinned:
            torch.cuda.synchronize(self._engine.device)
        if self._weights is None or self._moments is None:
            return None
        return Snapshot(self._weights, self._moments)

    def _names(self, pieces: Sequence[Piece], shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Tensors that have moments: under ZeRO all of them, else those that Adam has ever updated."""
        return [piece.name for piece in pieces] if self._engine.stage == 0 else list(shapes)

    def _collect(self, held: Mapping[str, Sequence[Piece]], into: HostTensors | None) -> None:
        """Bring this rank's and all others' pieces into rank 0's memory; kinds other than the weights become name prefixes."""
        own = [(_named(kind, piece.name), piece) for kind, pieces in held.items() for piece in pieces]
        if self._engine.whole_on_rank_0(*held):
            if into is not None:
                for name, piece in own:
                    _place(into, (name, piece.start, piece.values.numel()), piece.values)
            return
        layouts = self._layout(tuple(held), [(name, piece.start, piece.values.numel()) for name, piece in own])
        longest = max(sum(count for _, _, count in places) for places in layouts)
        self._reserve(longest, len(layouts))
        if own:
            torch.cat([piece.values for _, piece in own], out=self._sent[: sum(piece.values.numel() for _, piece in own)])
        step = _numbers_at_once(len(layouts))
        for begin in range(0, longest, step):
            count = min(step, longest - begin)
            parts = [part[:count] for part in self._received]
            dist.gather(self._sent[begin : begin + count], parts if into is not None else None, dst=0)
            if into is not None:
                for part, places in zip(parts, layouts, strict=True):
                    _unpack(part, begin, places, into)

    def _layout(self, kinds: tuple[str, ...], own: list[Place]) -> list[list[Place]]:
        """What each rank sends, in its order; agreed on once, for an engine never cuts its state anew."""
        if kinds not in self._layouts:
            found = distributed.gather_objects(own)
            if not any(found):
                return found
            self._layouts[kinds] = found
        return self._layouts[kinds]

    def _reserve(self, longest: int, num_ranks: int) -> None:
        if self._sent.numel() < longest:
            self._sent = torch.zeros(longest, device=self._engine.device)
            if self._is_main:
                size = min(longest, _numbers_at_once(num_ranks))
                self._received = [torch.empty(size, device=self._engine.device) for _ in range(num_ranks)]


def _numbers_at_once(num_ranks: int) -> int:
    return max(1, GATHER_NUMBERS // num_ranks)


def _named(kind: str, name: str) -> str:
    return name if kind == "weight" else f"{kind}/{name}"


def _unpack(part: Tensor, begin: int, places: Sequence[Place], into: HostTensors) -> None:
    """`part` holds a rank's packed pieces from number `begin` on; copy what of them it holds to where it belongs."""
    at = 0
    for name, start, count in places:
        first, last = max(at, begin), min(at + count, begin + part.numel())
        if first < last:
            _place(into, (name, start + first - at, last - first), part[first - begin : last - begin])
        at += count


def _place(into: HostTensors, where: Place, values: Tensor) -> None:
    name, start, count = where
    into.tensors[name].view(-1)[start : start + count].copy_(values.reshape(-1), non_blocking=True)
