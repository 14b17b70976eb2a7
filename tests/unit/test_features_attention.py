"""One attention: values and gradients against the written-out formula, and the choice of implementation."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.features import attention as attention_module
from data_pipeline.features.attention import attention, implementation


def explicit(q, k, v, scale):
    """The definition, one query at a time."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for n in range(q.shape[2]):
                logits = torch.stack([(q[b, h, n] * key).sum() for key in k[b, h]]) * scale
                weights = torch.exp(logits - logits.max())
                out[b, h, n] = (weights[:, None] * v[b, h]).sum(0) / weights.sum()
    return out


def inputs(batch=2, heads=3, queries=4, keys=5, width=6, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = (queries, keys, keys)
    return [torch.randn(batch, heads, size, width, generator=draw, dtype=dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("scale", [None, 0.7, 2.0])
def test_values_and_gradients_are_the_formulas(scale):
    ours, theirs = inputs(), inputs()
    weight = torch.linspace(-1, 1, 2 * 3 * 4 * 6, dtype=torch.float64).view(2, 3, 4, 6)
    got, expected = attention(*ours, scale=scale), explicit(*theirs, scale=6**-0.5 if scale is None else scale)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)


def test_float32_is_close_to_float64():
    exact = inputs()
    single = [item.detach().float() for item in exact]
    assert attention(*single).dtype == torch.float32
    torch.testing.assert_close(attention(*single).double(), attention(*exact).detach(), rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 99), scale=st.floats(0.1, 3.0))
@settings(max_examples=20, deadline=None)
def test_constant_values_stay_and_key_order_is_nothing(seed, scale):
    q, k, v = (item.detach() for item in inputs(seed=seed))
    torch.testing.assert_close(attention(q, k, torch.full_like(v, 0.25), scale), torch.full_like(q, 0.25))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(attention(q, k, v, scale), attention(q, k[:, :, order], v[:, :, order], scale))


def test_the_choice_is_logged_once(caplog):
    attention_module._cpu_kernel.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            attention(*inputs())
    assert [record.message for record in caplog.records if "attention on" in record.message] == [
        "attention on cpu: torch scaled_dot_product_attention (xformers has no cpu kernels)"
    ]
    assert implementation("cpu") == "sdpa"


def fake_xformers(monkeypatch, kernel):
    """xformers as far as the probe sees it; the probe runs on the CPU here."""
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = kernel
    package = types.ModuleType("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    attention_module._xformers_kernel.cache_clear()


@pytest.fixture(autouse=True)
def _forget_probes():
    yield
    attention_module._xformers_kernel.cache_clear()


def right(q, k, v, scale=None):
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def test_a_kernel_that_works_is_used(monkeypatch):
    fake_xformers(monkeypatch, right)
    with torch.no_grad():  # the first use may fall in an extractor
        assert attention_module._xformers_kernel("cpu", None) is right


@pytest.mark.parametrize("fault", ["raises", "wrong numbers", "wrong gradients"])
def test_a_kernel_that_does_not_work_is_refused_with_its_reason(monkeypatch, caplog, fault):
    def kernel(q, k, v, scale=None):
        if fault == "raises":
            raise NotImplementedError("no operator found\nfor this device")
        if fault == "wrong gradients":
            return right(q.detach(), k, v, scale) + 0 * q
        return right(q, k, v, scale=1.0)

    fake_xformers(monkeypatch, kernel)
    with caplog.at_level(logging.WARNING):
        assert attention_module._xformers_kernel("cpu", None) is None
        assert attention_module._xformers_kernel("cpu", None) is None
    (message,) = [record.message for record in caplog.records]
    assert "xformers is not usable here" in message and "\n" not in message
    assert ("no operator found" if fault == "raises" else "other numbers") in message


def test_what_the_kernels_cannot_take_goes_to_torch():
    def takes(width, dtype):
        return attention_module._fits_xformers(*inputs(width=width, dtype=dtype))

    assert takes(8, torch.float32) and takes(16, torch.bfloat16)
    assert not takes(8, torch.float64)
    assert not takes(6, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="gpu: needs a CUDA device")
def test_cuda_gives_the_cpu_numbers():
    single = [item.detach().float() for item in inputs(width=16)]
    got = attention(*(item.cuda() for item in single), scale=0.5).cpu()
    torch.testing.assert_close(got, attention(*single, scale=0.5), rtol=5e-3, atol=5e-3)
