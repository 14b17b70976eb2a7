"""Command: SRL's ranking losses, value and gradient, over all B*T*P patches as one group. `python -m benchmarks.srl`.

Paths: decoder, encoder (the trainer's), decoder_plain, encoder_plain (whole matrices of pairs, autograd).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import plain_srl
from benchmarks.case import Case
from benchmarks.single import main
from trainer.kernels.ranking import decoder_ranking, encoder_ranking

PATHS = ("decoder", "decoder_plain", "encoder", "encoder_plain")
TEMPERATURE, NEIGHBOURS = 0.1, 8  # published; so many neighbours for each frame of a group


def prepare(case: Case) -> Callable[[], object]:
    draw = torch.Generator().manual_seed(0)
    tokens, near = case.frames * case.patches, min(NEIGHBOURS, case.patches) * case.frames
    features, targets, criterion = (
        torch.randn(case.batch, tokens, width, generator=draw).to(case.device) for width in (case.dim, case.dim, case.width)
    )
    labels = torch.randint(case.slots, (case.batch, tokens), generator=draw).to(case.device)
    features.requires_grad_()
    losses = {
        "decoder": lambda: decoder_ranking(features, targets, labels, case.slots, TEMPERATURE),
        "encoder": lambda: encoder_ranking(features, criterion, labels, case.slots, TEMPERATURE, near),
        "decoder_plain": lambda: plain_srl.decoder_ranking(features, targets, labels, TEMPERATURE),
        "encoder_plain": lambda: plain_srl.encoder_ranking(features, criterion, labels, TEMPERATURE, near),
    }

    def call() -> None:
        losses[case.path]().backward()
        features.grad = None

    return call


if __name__ == "__main__":
    raise SystemExit(main("benchmarks.srl", PATHS))
