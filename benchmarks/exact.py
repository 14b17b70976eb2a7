"""Every fast path against float64 on one device: name -> error beside what is allowed. Used by benchmarks.gpu.

float32 is allowed twice the plain path's own error, or a few roundings where the plain path has next to none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import decoder, plain_srl, plain_ssync, ssync
from benchmarks.case import Case
from trainer.kernels.ranking import decoder_ranking, encoder_ranking
from trainer.model.decoder import MLPDecoder

ROUNDING = 1e-5


class Check(NamedTuple):
    """Largest norm-relative error of value and gradients, and what is allowed."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def checks(case: Case) -> list[Check]:
    return [*_decoder(case), *_ssync(case), *_srl(case)]


def relative(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest over tensors of |found - wanted| / |wanted|; tensors next to zero are judged on the scale of all."""
    scale = max(float(one.double().norm()) for one in wanted)
    errors = [
        float((one.double() - other.double()).norm()) / max(float(other.double().norm()), 1e-6 * scale, 1e-300)
        for one, other in zip(found, wanted, strict=True)
    ]
    return max(errors)


def _decoder_gradients(case: Case, dtype: torch.dtype, half: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    path = "fused" if case.path == "fused" else "plain"
    model = MLPDecoder(case.dim, case.width, [case.hidden] * 3, case.grid, path=path, products=case.matmul)
    model = model.to(case.device, dtype)
    inputs = decoder.Inputs(case)
    inputs.target = inputs.target.to(dtype)
    inputs.slots = inputs.slots.detach().to(dtype).requires_grad_()
    inputs.boundary_share = inputs.boundary_share.to(dtype)
    with torch.autocast(case.device, torch.bfloat16, enabled=half):
        loss = (decoder.fused if path == "fused" else decoder.stored)(model, inputs)
    loss.backward()
    return [leaf.grad for leaf in (inputs.slots, *model.parameters()) if leaf.grad is not None]


def _decoder(case: Case) -> list[Check]:
    fused, plain = replace(case, path="fused"), replace(case, path="plain")
    exact = _decoder_gradients(plain, torch.float64)
    found = [Check("decoder, fused, float64", relative(_decoder_gradients(fused, torch.float64), exact), 1e-10)]
    for name, half in (("float32", False), ("bf16", True)):
        own, theirs = (relative(_decoder_gradients(one, torch.float32, half), exact) for one in (fused, plain))
        found.append(Check(f"decoder, fused, {name} (plain: {theirs:.1e})", own, max(2 * theirs, ROUNDING)))
    return found


def _compare(name: str, fast: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]) -> list[Check]:
    """`fast` in both precisions against `plain` in float64; `inputs` take the gradient."""

    def run(loss: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [one.detach().to(dtype).requires_grad_() for one in inputs]
        value = loss(*leaves)
        return [value.detach()[None], *torch.autograd.grad(value, leaves)]

    exact = run(plain, torch.float64)
    theirs = relative(run(plain, torch.float32), exact)
    return [
        Check(f"{name}, float64", relative(run(fast, torch.float64), exact), 1e-9),
        Check(f"{name}, float32 (plain: {theirs:.1e})", relative(run(fast, torch.float32), exact), max(2 * theirs, ROUNDING)),
    ]


def _ssync(case: Case) -> list[Check]:
    config = case.run().objective.ssync
    draw = torch.Generator().manual_seed(0)
    shape = (case.batch, case.frames, case.slots, case.patches)
    maps = [torch.randn(shape, generator=draw).to(case.device) for _ in range(2)]
    return _compare(
        "SSync",
        lambda attn, objects: ssync.fast(attn, objects, case.grid, config),
        lambda attn, objects: plain_ssync.loss(attn, objects, case.grid, config.merge.threshold),
        maps,
    )


def _srl(case: Case) -> list[Check]:
    draw, tokens = torch.Generator().manual_seed(0), case.frames * case.patches
    near = min(8, tokens - 1)

    def tensor(width: int) -> Tensor:
        return torch.randn(case.batch, tokens, width, generator=draw).to(case.device)

    features, targets, criterion = tensor(case.dim), tensor(case.dim), tensor(case.width)
    labels = torch.randint(case.slots, (case.batch, tokens), generator=draw).to(case.device)
    decoder_checks = _compare(
        "SRL decoder",
        lambda one: decoder_ranking(one, targets.to(one.dtype), labels, case.slots, 0.1),
        lambda one: plain_srl.decoder_ranking(one, targets.to(one.dtype), labels, 0.1),
        [features],
    )
    encoder_checks = _compare(
        "SRL encoder",
        lambda one: encoder_ranking(one, criterion.to(one.dtype), labels, case.slots, 0.1, near),
        lambda one: plain_srl.encoder_ranking(one, criterion.to(one.dtype), labels, 0.1, near),
        [features],
    )
    return decoder_checks + encoder_checks
