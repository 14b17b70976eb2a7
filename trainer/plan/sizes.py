"""Every size that a plan is made of. RunConfig and a layout come in, one frozen Sizes goes out. Letters: model/outputs.py."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.errors import ConfigError
from trainer.config import RunConfig

FLOAT = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the run would go. Without GPUs a rank is a CPU process."""

    nodes: int = 1
    ranks_per_node: int = 1
    gpu: bool = True

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be at least 1; change --{name.replace('_', '-')}")

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """B here is the clips of one micro-batch of one rank; `frames` = B*T. Widths in numbers, not bytes."""

    run: RunConfig
    layout: Layout
    clips: int  # B
    slots: int  # S
    dim: int  # D
    width: int  # E
    patches: int  # P of this rank: all of a frame, or its band where ranks share them
    hidden: tuple[int, ...]  # of the decoder
    half: bool  # wide products in bf16

    @property
    def clip_len(self) -> int:
        return self.run.data.clip_len

    @property
    def frames(self) -> int:
        return self.clips * self.clip_len

    @property
    def whole_frame(self) -> int:
        """Patches of a frame over all ranks that share it."""
        return self.run.model.grid[0] * self.run.model.grid[1]

    @property
    def data_world(self) -> int:
        """Ranks, or groups of ranks that share patches, with clips of their own."""
        return self.layout.world // self.run.parallel.patch_ranks

    @property
    def tokens(self) -> int:
        """Patches of a micro-batch: B*T*P."""
        return self.frames * self.patches

    @property
    def rows(self) -> int:
        """What the decoder's hidden layers see: one row for each slot at each patch."""
        return self.tokens * self.slots

    @property
    def iterations(self) -> int:
        """Slot attention iterations of a clip, one after the other."""
        model = self.run.model
        return model.iters_first + model.iters_next * (self.clip_len - 1)

    @property
    def micro_batches(self) -> int:
        return self.run.parallel.accumulation

    @property
    def wide_bytes(self) -> int:
        """Bytes of a number in the two wide MLPs."""
        return 2 if self.half else 4

    @property
    def srl(self) -> bool:
        srl = self.run.objective.srl
        return max(srl.decoder_weight, srl.encoder_weight, srl.regulariser_weight) > 0

    @property
    def one_pass(self) -> bool:
        """The decoder learns chunk by chunk, which needs all its targets before it runs (Objective.fits_one_pass)."""
        merge = self.run.objective.ssync.merge
        waits = self.ssync and merge.mode != "none" and merge.source != "A"
        return self.chunked and not waits and not self.srl

    @property
    def chunked(self) -> bool:
        """No hidden tensor of all rows. Without `one_pass` the backward computes each chunk once more."""
        return self.run.model.decoder_path == "fused"

    @property
    def boundary(self) -> bool:
        return self.run.objective.ssync.boundary_weight > 0

    @property
    def interior(self) -> bool:
        return self.run.objective.ssync.interior_weight > 0

    @property
    def ssync(self) -> bool:
        return self.boundary or self.interior


def sizes_of(run: RunConfig, layout: Layout) -> Sizes:
    """Raises ConfigError where the global batch has no clip for some rank, or ranks cannot share patches as asked."""
    model, parallel = run.model, run.parallel
    if layout.ranks_per_node % parallel.patch_ranks:
        raise ConfigError(
            f"parallel.patch_ranks={parallel.patch_ranks} does not divide the {layout.ranks_per_node} ranks of a node; "
            "neighbouring ranks of a node share a clip's patches; change one of them"
        )
    data_world = layout.world // parallel.patch_ranks
    if run.optim.global_batch < data_world:
        raise ConfigError(
            f"optim.global_batch={run.optim.global_batch} for {layout.world} ranks; every rank needs a clip; "
            "raise optim.global_batch or take fewer nodes"
        )
    per_rank = -(-run.optim.global_batch // data_world)
    return Sizes(
        run=run,
        layout=layout,
        clips=-(-per_rank // parallel.accumulation),
        slots=model.num_slots,
        dim=model.slot_dim,
        width=model.feature_dim,
        patches=-(-model.grid[0] // parallel.patch_ranks) * model.grid[1],
        hidden=tuple(model.decoder_hidden),
        half=parallel.precision == "bf16" or (parallel.precision == "auto" and layout.gpu),
    )


def parameters(sizes: Sizes) -> dict[str, int]:
    """Trainable numbers by part of the network."""
    dim, width = sizes.dim, sizes.width
    norm, square = 2 * dim, dim * dim
    mlp = norm + (4 * square + 4 * dim) + (4 * square + dim)  # LayerNorm, dim -> 4 dim -> dim
    layers = [dim, *sizes.hidden, width + 1]
    return {
        "feature transform": 2 * width + (2 * width * width + 2 * width) + (2 * width * dim + dim),
        "first queries": sizes.slots * dim,
        "slot attention": 2 * norm + 3 * square + (6 * square + 6 * dim) + mlp,
        "predictor": norm + (3 * square + 3 * dim) + (square + dim) + mlp,
        "projectors": (width + dim) * dim if sizes.run.model.projectors else 0,
        "decoder": sizes.whole_frame * dim + sum(a * b + b for a, b in zip(layers[:-1], layers[1:], strict=True)),
    }
