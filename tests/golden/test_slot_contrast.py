"""Slot contrast and feature reconstruction against the released code, values and gradients."""

from __future__ import annotations

import pytest
import torch
from golden_files import assert_gradient, assert_values, load
from test_core_stack import waves

from trainer.config import SlotContrastConfig
from trainer.model.outputs import ModelOutput
from trainer.objective.feature_reconstruction import feature_reconstruction
from trainer.objective.slot_contrast import slot_contrast


@pytest.mark.parametrize("file", ["slot_contrast_0.npz", "slot_contrast_1.npz", "slot_contrast_2.npz"])
@pytest.mark.parametrize(("scope", "official"), [("global", "batch"), ("rank", "batch"), ("video", "novideo_batch")])
@pytest.mark.parametrize("method", ["slotcontrast", "ssync"])
def test_value_and_gradient(file: str, scope: str, official: str, method: str) -> None:
    tensors, meta = load(f"losses/{file}")
    slots = tensors["slots"].requires_grad_()
    value = slot_contrast(slots, slice(None), SlotContrastConfig(scope=scope, temperature=meta["temperature"]))
    loss = value.sum / value.count.float()
    loss.backward()
    assert_values(loss.detach(), tensors[f"{method}/{official}/loss"], "loss")
    assert_gradient(slots.grad, tensors[f"{method}/{official}/grad_slots"], "slots")


def test_one_frame_has_no_pair() -> None:
    """The released loss is NaN there, its form for images exactly 0; ours is a sum of 0 over a count of 0."""
    tensors, _ = load("losses/slot_contrast_3_t1.npz")
    slots = tensors["slots"].requires_grad_()
    value = slot_contrast(slots, slice(None), SlotContrastConfig())
    value.sum.backward()
    assert tensors["slotcontrast/batch/loss"].isnan() and tensors["ssync_image/batch/loss"] == 0
    assert value.sum == 0 and value.count == 0
    assert slots.grad is not None and not slots.grad.any()


def test_number_in_float64() -> None:
    value = slot_contrast(waves((3, 4, 5, 6), 1.3, 0.2), slice(None), SlotContrastConfig(scope="rank"))
    torch.testing.assert_close(value.sum / value.count, torch.tensor(7.9893012091, dtype=torch.float64), atol=1e-8, rtol=0)


def test_feature_reconstruction() -> None:
    tensors, meta = load("losses/feature_mse.npz")
    first, last = meta["pred_dims"]
    prediction = tensors["pred"].requires_grad_()
    unused = torch.zeros(2, 3, 1, 9)
    output = ModelOutput(unused, unused, unused, prediction[..., first:last], tensors["target"], (3, 3))
    value = feature_reconstruction(output)
    loss = value.sum / value.count.float()
    loss.backward()
    assert_values(loss.detach(), tensors["loss"], "loss")
    assert_gradient(prediction.grad, tensors["grad_pred"], "prediction")
