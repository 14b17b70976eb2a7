"""Command: the decoder with reconstruction and boundary loss, forward + backward, on B*T frames. `python -m benchmarks.decoder`.

Paths: fused, plain, official_form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import official_form
from benchmarks.case import PATHS, Case
from benchmarks.single import main
from trainer.kernels.label_error import label_error
from trainer.model.decoder import MLPDecoder
from trainer.model.outputs import DecoderTask
from trainer.precision import at_least_float32


class Inputs:
    """Slots, target features, labels and chosen patches of B clips: random, as their sizes do not depend on values."""

    def __init__(self, case: Case) -> None:
        draw = torch.Generator().manual_seed(0)
        device, self.lead = torch.device(case.device), (case.batch, case.frames)
        self.slots = torch.randn(*self.lead, case.slots, case.dim, generator=draw).to(device).requires_grad_()
        self.target = torch.randn(*self.lead, case.patches, case.width, generator=draw).to(device)
        labels = torch.randint(case.slots, (*self.lead, case.patches), generator=draw)
        self.labels = labels.to(torch.int8).to(device)
        self.chosen = (torch.rand(*self.lead, case.patches, generator=draw) < 0.3).to(device)
        self.boundary_share = 1 / (self.chosen.sum() * case.slots)


def prepare(case: Case) -> Callable[[], object]:
    torch.manual_seed(0)
    path = "fused" if case.path == "fused" else "plain"
    decoder = MLPDecoder(case.dim, case.width, [case.hidden] * 3, case.grid, path=path, products=case.matmul).to(case.device)
    if case.path == "official_form":
        official_form.adopt(decoder)
    inputs, half = Inputs(case), case.precision == "bf16"
    loss = fused if path == "fused" else stored

    def call() -> None:
        with torch.autocast(case.device, torch.bfloat16, enabled=half):
            total = loss(decoder, inputs)
        total.backward()
        decoder.zero_grad(set_to_none=True)
        inputs.slots.grad = None

    return call


def stored(decoder: MLPDecoder, inputs: Inputs) -> Tensor:
    """Both losses on what the decoder gives, by autograd."""
    reconstruction, logits = decoder(inputs.slots.flatten(0, 1))
    error = (at_least_float32(reconstruction) - inputs.target.flatten(0, 1)).square().mean()
    boundary = label_error(at_least_float32(logits).unflatten(0, inputs.lead), inputs.labels, inputs.chosen, 1.0)
    return error + boundary * inputs.boundary_share


def fused(decoder: MLPDecoder, inputs: Inputs) -> Tensor:
    """Value and gradient in one pass over chunks; what comes out carries the gradient."""
    task = DecoderTask(
        num_real=inputs.lead[0],
        reconstruction=1 / inputs.labels.numel(),
        boundary=inputs.boundary_share,
        labels=inputs.labels,
        chosen=inputs.chosen,
    )
    carrier, _ = decoder(inputs.slots, task, inputs.target)
    return carrier


if __name__ == "__main__":
    raise SystemExit(main("benchmarks.decoder", PATHS))
