"""SSync's Triton kernels against their plain twins, in Triton's interpreter: no GPU needed, but triton itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.errors import ConfigError
from trainer.config import MergeConfig, SSyncConfig
from trainer.kernels import choice
from trainer.objective.slot_merging import _largest_of_component
from trainer.objective.ssync import boundary_term, interior_term, select


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("triton", reason="triton: make test-kernels runs these")
        from triton.language import sum as total
        from triton.runtime.interpreter import InterpretedFunction

        if not isinstance(total, InterpretedFunction):
            pytest.skip("triton: it was imported before; make test-kernels runs these alone")
        yield


def logits_of(seed: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Whole numbers tie now and then; one map lies in memory with the slots last, as the decoder leaves it."""
    generator = torch.Generator().manual_seed(seed)
    attn, obj = torch.randint(-3, 4, (2, *shape), generator=generator).float()
    copies = torch.randint(shape[2], (shape[2],), generator=generator)
    return attn[:, :, copies] * 2 + attn, obj.transpose(2, 3).contiguous().transpose(2, 3)


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)),
    st.integers(0, 1000),
    st.sampled_from(["clamp", "ignore"]),
    st.sampled_from([1.0, 0.4]),
)
def test_kernels_equal_their_twins(interpreted: None, shape: tuple[int, ...], seed: int, border: str, temperature: float) -> None:
    *leading, rows, columns = shape
    maps = [logits.requires_grad_() for logits in logits_of(seed, (*leading, rows * columns))]
    found = []
    for kernels in ("torch", "triton"):
        merge = MergeConfig(threshold=0.3)
        config = SSyncConfig(merge=merge, border=border, temperature=temperature, max_different=4, kernels=kernels)
        chosen = select(*maps, (rows, columns), config)
        terms = boundary_term(maps[1], chosen, config), interior_term(maps[0], chosen, config)
        total = terms[0].sum + 2 * terms[1].sum
        found.append((chosen, [value.count for value in terms], total, *torch.autograd.grad(total, maps)))
    (plain, plain_counts, *plain_numbers), (fast, counts, *numbers) = found
    assert all(torch.equal(one, other) for one, other in zip(fast, plain, strict=True)) and counts == plain_counts
    for one, other in zip(numbers, plain_numbers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(0, 1000), st.sampled_from([0.1, 0.3, 0.6]))
def test_components_and_their_ties(interpreted: None, num_slots: int, seed: int, density: float) -> None:
    from trainer.kernels import ssync_triton

    generator = torch.Generator().manual_seed(seed)
    upper = (torch.rand(2, num_slots, num_slots, generator=generator) < density).triu(1)
    edges, areas = upper | upper.mT, torch.randint(3, (2, num_slots), generator=generator)
    assert torch.equal(ssync_triton.largest_of_component(edges, areas), _largest_of_component(edges, areas))


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.zeros(2)
    monkeypatch.setattr(choice, "_is_installed", lambda: True)
    assert [choice.use_triton(values, kernels) for kernels in ("auto", "torch", "triton")] == [False, False, True]
    assert not choice.use_triton(values.double(), "triton") and not choice.use_triton(values[:0], "triton")
    monkeypatch.setattr(choice, "_is_installed", lambda: False)
    with pytest.raises(ConfigError, match="pip install triton"):
        choice.use_triton(values, "triton")
