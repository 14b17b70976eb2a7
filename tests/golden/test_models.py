"""Whole models on given features against the released code: every tensor, loss and parameter gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_files import assert_gradient, assert_values, build_model, load, losses, names, under

from trainer.config import MergeConfig, ObjectiveConfig, SSyncConfig
from trainer.model.official_names import from_official
from trainer.objective import Objective
from trainer.objective.ssync import select

FILES = [file for file in names("models") if file not in ("ssync_trajectory.npz", "srl_stages.npz")]
TERMS = {
    "loss_featrec": "feature_reconstruction",
    "loss_ss": "slot_contrast",
    "loss_grp2deccls": "ssync_boundary",
    "loss_dec2grpcls": "ssync_interior",
}


def objective_of(meta: dict[str, Any]) -> Objective:
    if "merge_iou_threshold" not in meta:
        return Objective(ObjectiveConfig(), max_steps=100)
    merge = MergeConfig(threshold=meta["merge_iou_threshold"])
    ssync = SSyncConfig(boundary_weight=1.0, interior_weight=1.0, start_fraction=meta["synergistic_warmup_ratio"], merge=merge)
    return Objective(ObjectiveConfig(ssync=ssync), max_steps=meta["max_steps"])


def test_every_file_is_here() -> None:
    assert len(FILES) == 6


@pytest.mark.parametrize("file", FILES)
def test_forward(file: str) -> None:
    tensors, meta = load(f"models/{file}")
    model = build_model(meta, under(tensors, "param"), torch.float32)
    output = model(tensors["features"])
    found = {
        "mapped_features": model.transform(tensors["features"]),
        "slots": output.slots,
        "slots_predicted": model.recurrence.predictor(output.slots.flatten(0, 1)).view_as(output.slots),
        "attn": output.attn_maps(),
        "attn_logits": output.attn_logits,
        "decoder_alpha": output.object_logits,
        "decoder_masks": output.object_maps(),
        "reconstruction": output.reconstruction,
    }
    for name, value in found.items():
        if name in tensors:
            assert_values(value, tensors[name], name)


@pytest.mark.parametrize("file", FILES)
def test_losses_and_gradients(file: str) -> None:
    tensors, meta = load(f"models/{file}")
    model = build_model(meta, under(tensors, "param"), torch.float32)
    objective = objective_of(meta)
    means = losses(model, objective, tensors["features"], meta.get("global_step", 0))
    means["total"].backward()
    expected = {TERMS[name]: value for name, value in under(tensors, "loss").items()} | {"total": tensors["total"]}
    assert means.keys() == expected.keys()  # also: no SSync term on the last warm-up step
    for name, value in expected.items():
        assert_values(means[name].detach(), value, name)
    gradients = from_official(under(tensors, "grad"), model.state_dict())
    for name, parameter in model.named_parameters():  # with one frame the predictor has none: zeros there
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_gradient(found, gradients[name], name)


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("ssync")])
def test_selection(file: str) -> None:
    tensors, meta = load(f"models/{file}")
    output = build_model(meta, under(tensors, "param"), torch.float32)(tensors["features"])
    chosen = select(output.attn_logits, output.object_logits, output.grid, objective_of(meta).config.ssync)
    found = {
        "grp_labels": chosen.attn_labels,
        "dec_labels": chosen.object_labels,
        "grp_labels_merged": chosen.merged_attn_labels,
        "dec_labels_merged": chosen.merged_object_labels,
        "boundary": chosen.boundary,
        "interior": chosen.interior,
    }
    for name, value in found.items():
        assert torch.equal(value.unflatten(2, output.grid).to(tensors[name].dtype), tensors[name]), name
