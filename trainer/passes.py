"""How a step's micro-batches go through the network. What each of them gives the step comes out: slots, terms, an anchor.

Counts and coupled terms need every micro-batch before the first backward. One micro-batch keeps its graph between; several are
looked at without gradient first, then run again one by one, because memory has room for one. In reproducible mode a single one
is treated as several are: how many clips a rank has must not choose the way.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from data_pipeline.batch import ClipBatch
from trainer import distributed
from trainer.engine import Engine
from trainer.model.outputs import Decoded, DecoderTask, Encoded, OnePassOutput
from trainer.objective import Lessons, Objective, TermValue


class Seen(NamedTuple):
    """A micro-batch after the network: real clips' slots, local terms, and what else belongs into the backward.

    `anchor` is a scalar of value 0 with every output in its graph: the backward of all ranks then runs the same collectives,
    also where a rank holds only padding. It carries the fused decoder's gradient.
    """

    slots: Tensor
    terms: dict[str, TermValue]
    anchor: Tensor


class Passes(Protocol):
    def look(self) -> list[Seen]:
        """Every micro-batch, before anything is updated. Collective."""

    def again(self, number: int, looked: Seen) -> Seen:
        """Micro-batch `number` with its graph. Collective."""


def choose_passes(engine: Engine, objective: Objective, parts: list[ClipBatch], real_clips: int, step: int) -> Passes:
    """One pass where decoder and objective allow it at this step."""
    if engine.module.decoder.path == "fused" and objective.fits_one_pass(step):
        return DecoderInOnePass(engine, objective, parts, real_clips, step)
    return WholeMaps(engine, objective, parts, step)


class WholeMaps:
    """The network makes reconstruction and object logits, and losses are taken from them: any objective."""

    def __init__(self, engine: Engine, objective: Objective, parts: list[ClipBatch], step: int) -> None:
        self.engine, self.objective, self.parts, self.step = engine, objective, parts, step
        self.once = len(parts) == 1 and not engine.reproducible

    def look(self) -> list[Seen]:
        return [self._run(part, with_gradient=self.once) for part in self.parts]

    def again(self, number: int, looked: Seen) -> Seen:
        return looked if self.once else self._run(self.parts[number], with_gradient=True)

    def _run(self, part: ClipBatch, with_gradient: bool) -> Seen:
        output = self.engine.forward(_features(part)) if with_gradient else self.engine.look(_features(part))
        real = output.first(part.num_real)
        return Seen(real.slots, self.objective.local(real, self.step), _nothing(*output[:4]))


class DecoderInOnePass:
    """The decoder takes its losses and their gradient as it runs, and keeps no maps.

    So the number of boundary patches over all ranks and micro-batches must be known before: it comes from the encoder alone,
    a small part of the arithmetic. The number of interior patches comes from the decoder's labels and is not in its gradient:
    several micro-batches are decoded first, their gradients kept, and handed over once the encoder runs with its graph.
    """

    def __init__(self, engine: Engine, objective: Objective, parts: list[ClipBatch], real_clips: int, step: int) -> None:
        self.engine, self.objective, self.parts, self.step = engine, objective, parts, step
        self.real_clips = real_clips
        self.once = len(parts) == 1 and not engine.reproducible
        self.lessons: list[Lessons | None] = [None] * len(parts)
        self.decoded: list[Decoded | None] = [None] * len(parts)
        self.boundary_count: Tensor | None = None

    def look(self) -> list[Seen]:
        if not self.once and self.objective.is_active("ssync_boundary", self.step):
            for number, part in enumerate(self.parts):
                self.engine.look(_features(part), partial(self._note, number))
            self.boundary_count = self._count_boundary()
        return [self._run(number, with_gradient=self.once) for number in range(len(self.parts))]

    def again(self, number: int, looked: Seen) -> Seen:
        return looked if self.once else self._run(number, with_gradient=True)

    def _run(self, number: int, with_gradient: bool) -> Seen:
        call = self.engine.forward if with_gradient else self.engine.look
        part, known = self.parts[number], self.decoded[number]
        self.decoded[number] = None
        output = call(_features(part), lambda encoded: self._task(number, encoded) if known is None else known)
        if not with_gradient:
            self.decoded[number] = output.decoded
        return self._seen(output, part.num_real, self.lessons[number])

    def _note(self, number: int, encoded: Encoded) -> None:
        self.lessons[number] = self.objective.lessons(encoded.first(self.parts[number].num_real), self.step)

    def _task(self, number: int, encoded: Encoded) -> DecoderTask:
        if self.lessons[number] is None:
            self._note(number, encoded)
        if self.boundary_count is None and self.objective.is_active("ssync_boundary", self.step):
            self.boundary_count = self._count_boundary()
        num_real, frames = self.parts[number].num_real, encoded.slots.shape[1]
        patches = self.real_clips * frames * math.prod(self.engine.module.grid)  # of whole frames, not of this rank's band
        return self.objective.decoder_task(self.lessons[number], num_real, patches, self.boundary_count, self.step)

    def _count_boundary(self) -> Tensor:
        """Boundary patches over all ranks and micro-batches, float64 as all counts."""
        own = [lessons.boundary.chosen.sum(dtype=torch.float64) for lessons in self.lessons if lessons is not None]
        return distributed.all_sum(torch.stack(own).sum())

    def _seen(self, output: OnePassOutput, num_real: int, lessons: Lessons | None) -> Seen:
        assert output.decoded is not None
        encoded = Encoded(output.slots, output.attn_logits, output.grid).first(num_real)
        labels = output.decoded.object_labels[:num_real]
        terms = self.objective.local_one_pass(encoded, output.decoded._replace(object_labels=labels), lessons, self.step)
        return Seen(encoded.slots, terms, output.carrier + _nothing(output.slots, output.attn_logits))


def _features(part: ClipBatch) -> Tensor:
    """Stored floats as they are: the network reads them in float32 where it needs them, a few frames at a time. Other codecs
    are restored as a whole."""
    return part.features if part.features.is_floating_point() else part.decoded()


def _nothing(*tensors: Tensor) -> Tensor:
    """Sums of nothing, so that a value which is not finite stays out of them."""
    return torch.stack([tensor[:0].sum().float() for tensor in tensors]).sum()
