"""Exact sums: no order, no padding and no cut changes a bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from data_pipeline.errors import ConfigError
from trainer.config import ParallelConfig
from trainer.reproducible import ExactGradient


def summed(gradients: list[torch.Tensor], parameter: nn.Parameter | None = None) -> torch.Tensor:
    parameter = parameter or nn.Parameter(torch.zeros(gradients[0].shape))
    exact = ExactGradient([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        exact.take()
        assert parameter.grad is None
    exact.give()
    return parameter.grad


@pytest.fixture
def gradients():
    random = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-9, 6, (50, 1, 1), generator=random)
    return list(torch.randn(50, 7, 3, generator=random) * sizes)


def test_the_order_of_clips_changes_nothing(gradients):
    plain = torch.zeros(7, 3)
    for gradient in gradients:
        plain += gradient
    backwards = torch.zeros(7, 3)
    for gradient in reversed(gradients):
        backwards += gradient
    assert not torch.equal(plain, backwards), "these numbers must be ones whose order matters"
    assert torch.equal(summed(gradients), summed(gradients[::-1]))


def test_it_is_the_sum_rounded_once(gradients):
    exact = torch.tensor(
        [[math.fsum(g[row, column].item() for g in gradients) for column in range(3)] for row in range(7)], dtype=torch.float64
    )
    assert torch.equal(summed(gradients), exact.float())


def test_small_gradients_keep_their_digits():
    """Adam divides by sqrt(v) + 1e-8: what is far below that moves nothing, what is near it must be right."""
    small = torch.tensor([1.2345678e-10, -3e-12, 2e-30])
    assert summed([small]) == pytest.approx(small, rel=1e-6, abs=2e-18)


def test_padding_adds_nothing(gradients):
    assert torch.equal(summed(gradients), summed([torch.zeros(7, 3), *gradients, -torch.zeros(7, 3)]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**30])
def test_a_gradient_that_is_no_number_is_not_lost(bad):
    total = summed([torch.ones(2), torch.tensor([1.0, bad]), torch.ones(2)])
    assert torch.isnan(total).all()


def test_a_sum_begins_anew_and_a_parameter_without_gradient_has_none():
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    exact = ExactGradient([used, unused])
    for _ in range(2):
        used.grad = torch.ones(2)
        exact.take()
        exact.give()
        assert used.grad.tolist() == [1, 1] and unused.grad is None


@pytest.mark.parametrize("more", [{"zero_stage": 1}, {"zero_stage": 0, "patch_ranks": 2}])
def test_settings_that_cannot_be_reproducible_are_refused(more):
    with pytest.raises(ConfigError, match=r"parallel.reproducible=true, parallel\.\w+=\d; .*set parallel"):
        ParallelConfig(reproducible=True, **more)
