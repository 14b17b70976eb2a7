"""Arithmetic of an update on one rank. Sizes come in; multiply-adds (as 2 FLOP) and bytes moved by part go out.

Matrix products only: what stands between them is counted as bytes that pass through memory, which is what it costs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from trainer.plan.sizes import Sizes, parameters

# depth of the ViTs by width: S, B, L, g
VIT_DEPTH = {384: 12, 768: 12, 1024: 24, 1536: 40}


class Work(NamedTuple):
    """FLOP of matrix products, bytes of elementwise passes, and how many device calls must follow one another."""

    flop: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    def __add__(self, other: object) -> Work:
        assert isinstance(other, Work)
        return Work(self.flop + other.flop, self.moved + other.moved, self.calls + other.calls)

    def times(self, factor: float) -> Work:
        return Work(*(value * factor for value in self))


def step_work(sizes: Sizes, online: bool = False) -> dict[str, Work]:
    """One update of one rank by part: forward and backward of all micro-batches, and Adam.

    With accumulation every micro-batch is first looked at without gradient, because losses divide by counts of all of them.
    """
    parts = _micro_batch(sizes)
    if online:
        parts = {"frozen ViT forward": backbone(sizes)} | parts
    if sizes.micro_batches > 1:
        parts["look without gradient"] = _look(sizes)
    whole = {name: work.times(sizes.micro_batches) for name, work in parts.items()}
    return whole | {"Adam": Work(0.0, 4 * 8 * sum(parameters(sizes).values()), 60)}


def _micro_batch(sizes: Sizes) -> dict[str, Work]:
    transform, attention, predictor = feature_transform(sizes), slot_attention(sizes), predict(sizes)
    decoder = decoder_forward(sizes)
    return {
        "feature transform": transform.times(3),
        "slot attention": attention.times(3),
        "predictor": predictor.times(3),
        "decoder forward": decoder,
        "decoder backward": decoder_backward(sizes),
        "losses": losses(sizes),
    }


def _look(sizes: Sizes) -> Work:
    """Whole maps: everything forward. In one pass the decoder learns as it is looked at, so only the encoder runs twice, and
    once more where SSync's boundary patches must be counted before."""
    encoder = feature_transform(sizes) + slot_attention(sizes) + predict(sizes)
    return encoder.times(1 + sizes.boundary) if sizes.one_pass else encoder + decoder_forward(sizes)


def feature_transform(sizes: Sizes) -> Work:
    """Forward. LayerNorm, E -> 2E -> D."""
    flop = 2 * sizes.tokens * 2 * sizes.width * (sizes.width + sizes.dim)
    return Work(flop, sizes.tokens * sizes.width * (8 + 6 * sizes.wide_bytes), 5)


def slot_attention(sizes: Sizes) -> Work:
    """Forward. Keys and values of all frames at once, then the iterations of each frame, one after the other."""
    dim, queries = sizes.dim, sizes.clips * sizes.slots
    keys_values = 2 * sizes.tokens * dim * 2 * dim
    iteration = 2 * queries * (dim * dim + 2 * sizes.patches * dim + 6 * dim * dim + 8 * dim * dim)
    moved = 4 * (6 * sizes.tokens * dim + sizes.iterations * queries * sizes.patches * 6)
    return Work(keys_values + sizes.iterations * iteration, moved, 20 * sizes.iterations)


def predict(sizes: Sizes) -> Work:
    """Forward, between frames: one transformer block over the slots."""
    dim, queries = sizes.dim, sizes.clips * sizes.slots
    once = 2 * queries * (12 * dim * dim + 2 * sizes.slots * dim)
    steps = sizes.clip_len - 1
    return Work(steps * once, 4 * steps * 20 * queries * dim, 12 * steps)


def decoder_forward(sizes: Sizes) -> Work:
    """First layer once for slots and once for positions, hidden layers at every row, last layer after the mixture."""
    first, last = sizes.hidden[0], sizes.hidden[-1]
    middle = sum(a * b for a, b in pairwise(sizes.hidden))
    flop = 2 * (sizes.frames * sizes.slots + sizes.patches) * sizes.dim * first
    flop += 2 * sizes.rows * (middle + 2 * last) + 2 * sizes.tokens * last * sizes.width
    return Work(flop, sizes.wide_bytes * sizes.rows * 2 * sum(sizes.hidden), 12)


def decoder_backward(sizes: Sizes) -> Work:
    """Twice the forward: one product for the weights, one for what comes before; thrice where chunks are computed again."""
    forward = decoder_forward(sizes)
    again = sizes.chunked and not sizes.one_pass
    return Work((3 if again else 2) * forward.flop, sizes.wide_bytes * sizes.rows * 4 * sum(sizes.hidden), 30)


def losses(sizes: Sizes) -> Work:
    """Reconstruction, SSync's selection and its two losses, slot contrast over all clips of the global batch."""
    objective, num_slots = sizes.run.objective, sizes.slots
    flop = moved = calls = 0.0
    if objective.feature_reconstruction.weight:
        moved, calls = 4.0 * 5 * sizes.tokens * sizes.width, 10
    if sizes.ssync:
        flop += 2.0 * sizes.frames * num_slots**2 * sizes.patches
        moved += 4.0 * 16 * sizes.rows
        calls += 120 + 6 * num_slots
    if objective.slot_contrast.weight and sizes.clip_len > 1:
        everyone = {"global": sizes.run.optim.global_batch, "rank": sizes.clips, "video": 1}[objective.slot_contrast.scope]
        pairs = (sizes.clip_len - 1) * sizes.clips * num_slots * everyone * num_slots
        flop, moved, calls = flop + 3 * 2.0 * pairs * sizes.dim, moved + 4.0 * 6 * pairs, calls + 20
    return Work(flop, moved, calls) + (ranking(sizes) if sizes.srl else Work())


def ranking(sizes: Sizes) -> Work:
    """SRL: every patch of a group of frames with every other, value and gradient."""
    srl, dim = sizes.run.objective.srl, sizes.dim
    group = srl.group_frames * sizes.patches
    pairs = float(sizes.tokens * group)
    decoder = Work(2 * pairs * 2 * dim, 4.0 * 3 * pairs) if srl.decoder_weight else Work()
    encoder = Work(2 * pairs * (sizes.width + 3 * dim), 4.0 * 12 * pairs) if srl.encoder_weight else Work()
    return decoder + encoder


def backbone(sizes: Sizes) -> Work:
    """Forward of a ViT whose width is E: what online features cost."""
    tokens, width = sizes.whole_frame + 1, sizes.width  # also where ranks share patches: it sees whole frames
    depth = VIT_DEPTH.get(width, 12)
    flop = sizes.frames * depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
    return Work(flop, sizes.wide_bytes * sizes.frames * tokens * width * depth * 24, 12 * depth)
