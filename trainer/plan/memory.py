"""Memory of one rank by tensor. Sizes come in, Holdings go out: what is held, how large, and in which phases of an update.

The peak is the largest sum over the phases. Bytes are those that the allocator hands out; on a CPU the libraries' scratch space
comes on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from trainer.plan.sizes import FLOAT, Sizes, parameters

DECODER, SLOTS, TRANSFORM, UPDATE = "decoder", "slot attention backward", "feature transform backward", "update"
PHASES = (DECODER, SLOTS, TRANSFORM, UPDATE)
BEFORE_UPDATE = (DECODER, SLOTS, TRANSFORM)
ENCODER = (SLOTS, TRANSFORM)
CHUNK_ROWS = {"cpu": 704, "cuda": 32768}  # what kernels/fused_decoder.py takes where model.decoder_chunk_rows is 0
SRL_BLOCK = {"cpu": 2**21, "cuda": 2**26}  # numbers in a block of pairs, as kernels/ranking.py takes them


class Holding(NamedTuple):
    """`step`: made by an update and not part of what lies there before it: the network's weights, their master copy, inputs."""

    name: str
    bytes: int
    phases: tuple[str, ...] = PHASES
    step: bool = True
    host: bool = False  # in the host's memory, on a GPU machine too


def holdings(sizes: Sizes, stored_bytes: float = 2.0) -> list[Holding]:
    """All that is worth a line. `stored_bytes`: bytes of a feature as it lies in the shards."""
    found = [*_model(sizes), *_features(sizes, stored_bytes), *_encoder(sizes), *_decoder(sizes), *_losses(sizes)]
    return [one for one in found if one.bytes]


def phase_bytes(held: Sequence[Holding], *, step_only: bool = False) -> dict[str, int]:
    """Sum of each phase, the host's prefetch queue left out. `step_only`: above weights and inputs."""
    wanted = [one for one in held if not one.host and (one.step or not step_only)]
    return {phase: sum(one.bytes for one in wanted if phase in one.phases) for phase in PHASES}


def peak(held: Sequence[Holding], *, step_only: bool = False) -> tuple[str, int]:
    """(phase, bytes) of the highest."""
    sums = phase_bytes(held, step_only=step_only)
    phase = max(sums, key=lambda name: sums[name])
    return phase, sums[phase]


def _model(sizes: Sizes) -> list[Holding]:
    """Weights, gradients, Adam. Each of W ranks keeps 1/W of what its ZeRO stage splits."""
    stage, world = sizes.run.parallel.zero_stage, sizes.layout.world
    by_part = parameters(sizes)
    whole = FLOAT * sum(by_part.values())
    share = -(-whole // world) if stage else whole
    widest = FLOAT * max(_matrices(sizes))
    return [
        Holding("weights", share if stage == 3 else whole, step=False),
        Holding("master copy of the weights", share if stage else 0, step=False),
        Holding("weights gathered for a layer", FLOAT * max(by_part.values()) if stage == 3 else 0, BEFORE_UPDATE),
        Holding("gradients of all but the feature transform", whole - FLOAT * by_part["feature transform"], ENCODER),
        Holding("gradients", share, (UPDATE,)),
        Holding("gradient bucket", whole if stage else 0, ENCODER),
        Holding("Adam moments", 2 * share),
        Holding("Adam temporaries", 2 * share if stage else 2 * widest, (UPDATE,)),
    ]


def _matrices(sizes: Sizes) -> list[int]:
    layers = [sizes.dim, *sizes.hidden, sizes.width + 1]
    return [a * b for a, b in pairwise(layers)] + [2 * sizes.width**2]


def _features(sizes: Sizes, stored_bytes: float) -> list[Holding]:
    """Features as stored, on the host for the steps read ahead, on the device for this one, and as the model reads them."""
    numbers = sizes.tokens * sizes.width
    step_bytes = int(numbers * sizes.micro_batches * stored_bytes)
    read = int(sizes.frames * sizes.whole_frame * sizes.width * sizes.micro_batches * stored_bytes)  # of which a band goes on
    return [
        Holding("prefetch queue on the host", read * (sizes.run.data.prefetch_steps + 1), step=False, host=True),
        Holding("features as stored", step_bytes, step=False),
        Holding("features decoded to float32", 0 if stored_bytes == FLOAT else numbers * FLOAT, BEFORE_UPDATE),
    ]


def _encoder(sizes: Sizes) -> list[Holding]:
    """What feature transform and slot attention keep for their backward: of all frames, or of those recomputed together."""
    together = sizes.run.model.recompute_frames
    share = min(together, sizes.clip_len) / sizes.clip_len if together else 1.0
    phases = ENCODER if together else BEFORE_UPDATE  # recomputed: nothing is kept while the decoder runs
    tokens, width, wide = sizes.tokens * share, sizes.width, sizes.wide_bytes
    maps = FLOAT * sizes.clips * sizes.slots * sizes.patches
    queries = FLOAT * sizes.clips * sizes.slots * sizes.dim
    of_patches, iterations = FLOAT * tokens * sizes.dim, share * sizes.iterations
    without_transform = tuple(phase for phase in phases if phase != TRANSFORM)
    return [
        Holding("feature transform, saved", int(tokens * wide * 3 * width + of_patches), phases),
        Holding("feature transform, gradients", int(tokens * wide * 4 * width), (TRANSFORM,)),
        Holding("keys, values and their input", int(3 * of_patches), without_transform),
        Holding("keys and values, gradients", int(5 * of_patches), (SLOTS,)),
        Holding("slot attention maps, saved", int(2 * maps * iterations), without_transform),
        Holding("slot attention and predictor, saved", int(21 * queries * iterations), without_transform),
        Holding("attention logits and their gradient", (3 if sizes.interior else 1) * maps * sizes.clip_len, BEFORE_UPDATE),
    ]


def _decoder(sizes: Sizes) -> list[Holding]:
    """Hidden tensors of every row, or of a chunk: one saved for each layer, three of the widest while gradients pass."""
    wide = sizes.wide_bytes
    rows = chunk_rows(sizes) if sizes.chunked else sizes.rows
    whole = rows if sizes.one_pass else sizes.rows  # of what the losses read
    found = [
        Holding("decoder activations, saved", wide * rows * sum(sizes.hidden), (DECODER,)),
        Holding("decoder activations, passing", wide * rows * 3 * max(sizes.hidden), (DECODER,)),
        Holding("object logits and maps", FLOAT * 3 * whole, (DECODER,)),
        Holding("reconstruction and its gradient", FLOAT * 2 * (whole // sizes.slots) * sizes.width, (DECODER,)),
    ]
    if not sizes.chunked:
        return found
    gradients = FLOAT * parameters(sizes)["decoder"]
    first = FLOAT * (sizes.frames * sizes.slots + sizes.patches) * sizes.hidden[0]
    kept = sizes.micro_batches if sizes.one_pass else 0
    return [
        *found,
        Holding("decoder weight gradients", gradients, (DECODER,)),
        Holding("decoder weight gradients of other micro-batches", max(kept - 1, 0) * gradients, BEFORE_UPDATE),
        Holding("first layer of slots and positions, and gradient", 2 * first, (DECODER,)),
        Holding("decoder weights in bf16", 2 * sum(_matrices(sizes)[1:-1]) if sizes.half else 0, (DECODER,)),
        Holding("a weight gradient's product", FLOAT * max(_matrices(sizes)[1:-1]) if adds_copy(sizes) else 0, (DECODER,)),
    ]


def chunk_rows(sizes: Sizes) -> int:
    """Rows of a chunk: all slots of some patches, of several frames where a frame is small."""
    rows = sizes.run.model.decoder_chunk_rows or CHUNK_ROWS["cuda" if sizes.layout.gpu else "cpu"]
    patches = min(sizes.patches, max(1, rows // sizes.slots))
    if patches < sizes.patches:
        return -(-sizes.patches // -(-sizes.patches // patches)) * sizes.slots
    return min(sizes.frames, max(1, rows // (sizes.patches * sizes.slots))) * sizes.patches * sizes.slots


def adds_copy(sizes: Sizes) -> bool:
    """oneDNN's products and bf16's cannot add into a float32 sum; torch's float32 ones do."""
    return sizes.half or sizes.run.model.decoder_products != "torch"


def _losses(sizes: Sizes) -> list[Holding]:
    """SSync's maps where the decoder has not learnt in one pass; slot contrast: all pairs of slots of neighbouring frames."""
    contrast = sizes.run.objective.slot_contrast
    everyone = {"global": sizes.run.optim.global_batch, "rank": sizes.clips, "video": 1}[contrast.scope]
    pairs = max(sizes.clip_len - 1, 0) * sizes.clips * sizes.slots * everyone * sizes.slots
    gathered = FLOAT * 2 * everyone * sizes.clip_len * sizes.slots * sizes.dim
    block = FLOAT * 6 * SRL_BLOCK["cuda" if sizes.layout.gpu else "cpu"]
    return [
        Holding("SRL's blocks of pairs", block if sizes.srl else 0, (DECODER,)),
        Holding("SRL's projections", FLOAT * 8 * sizes.tokens * sizes.dim if sizes.srl else 0, (DECODER,)),
        Holding("SSync maps", FLOAT * 4 * sizes.rows if sizes.ssync and not sizes.one_pass else 0, (DECODER,)),
        Holding("slots of all ranks, gathered", gathered, (DECODER,)),
        Holding("slot contrast logits", FLOAT * 2 * pairs if contrast.weight else 0, (DECODER,)),
    ]
