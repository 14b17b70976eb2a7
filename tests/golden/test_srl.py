"""SRL's losses and its three stages against the released code: values, choices and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_files import assert_gradient, assert_values, build_model, load, losses, names, under
from test_core_stack import waves
from torch import Tensor

from trainer.config import ObjectiveConfig, SlotContrastConfig, SRLConfig
from trainer.model.official_names import from_official
from trainer.model.outputs import ModelOutput, Projected
from trainer.objective import Objective
from trainer.objective.slot_contrast import slot_contrast
from trainer.objective.srl import decoder_term, encoder_term, redundant_slots, regulariser_term

RANKING = [file for file in names("losses") if file.startswith("srl_ranking")]
REDUNDANCY = [file for file in names("losses") if file.startswith("srl_redundancy")]
TERMS = {
    "loss_recon": "feature_reconstruction",
    "loss_sc": "slot_contrast",
    "loss_cl_dec": "srl_decoder",
    "loss_cl_enc": "srl_encoder",
    "loss_reg": "srl_regulariser",
}


def output_of(features: Tensor, target: Tensor, criterion: Tensor, maps: Tensor) -> ModelOutput:
    projected = Projected(features, target, features)
    return ModelOutput(torch.empty(0), maps, maps, features, criterion, (1, maps.shape[3]), projected)


def settings(meta: dict[str, Any]) -> SRLConfig:
    return SRLConfig(temperature=meta["temp"], group_frames=meta["gf"], num_neighbours=meta["topk"])


def test_every_file_is_here() -> None:
    assert len(RANKING) == len(REDUNDANCY) == 3


@pytest.mark.parametrize("file", RANKING)
@pytest.mark.parametrize(("kind", "term"), [("dec", decoder_term), ("enc", encoder_term)])
def test_ranking(file: str, kind: str, term: Any) -> None:
    tensors, meta = load(f"losses/{file}")
    features = tensors["pred"].requires_grad_()
    value = term(output_of(features, tensors["dec_target"], tensors["enc_target"], tensors["masks"]), settings(meta))
    loss = value.sum / value.count.float()
    loss.backward()
    assert_values(loss.detach(), tensors[f"{kind}_loss"], "loss")
    assert_gradient(features.grad, tensors[f"{kind}_grad_pred"], "features")


@pytest.mark.parametrize("file", REDUNDANCY)
def test_regulariser(file: str) -> None:
    tensors, meta = load(f"losses/{file}")
    maps, slots = tensors["attn_over_patches"].requires_grad_(), tensors["slots"]
    empty = torch.empty(0)
    output = ModelOutput(slots, empty, empty, empty, empty, (meta["H"], meta["W"]), patch_maps=maps)
    value = regulariser_term(output, SRLConfig(num_redundant=meta["k"]))
    loss = value.sum / value.count.float()
    loss.backward()
    assert_values(loss.detach(), tensors["loss"], "loss")
    assert_gradient(maps.grad, tensors["grad_attn"], "maps")
    peaked = (maps.detach() * (maps.detach() + 1e-8).log()).sum(dim=3).mean(dim=1)
    chosen = redundant_slots(slots[:, -1], peaked, meta["k"])
    for clip, expected in zip(chosen, tensors["chosen"], strict=True):
        assert set(clip.nonzero().flatten().tolist()) == set(expected[expected >= 0].tolist())


@pytest.mark.parametrize("file", ["slot_contrast_0.npz", "slot_contrast_1.npz", "slot_contrast_2.npz", "slot_contrast_3_t1.npz"])
@pytest.mark.parametrize("method", ["srl_supcon", "ssync_image"])
def test_contrast_of_all_frames(file: str, method: str) -> None:
    tensors, meta = load(f"losses/{file}")
    slots = tensors["slots"].requires_grad_()
    config = SlotContrastConfig(form="supcon", temperature=meta["temperature"])
    value = slot_contrast(slots, slice(None), config)
    loss = value.sum / value.count.float()
    loss.backward()
    assert_values(loss.detach(), tensors[f"{method}/batch/loss"], "loss")
    assert_gradient(slots.grad, tensors[f"{method}/batch/grad_slots"], "slots")


def objective_of(meta: dict[str, Any]) -> Objective:
    """The file counts 100 steps: the regulariser in 0 to 2, the ranking losses after 4."""
    by_name = meta["config"]["losses"]
    ranking, regulariser = by_name["loss_cl_dec"], by_name["loss_reg"]
    config = SRLConfig(
        decoder_weight=0.1,
        encoder_weight=0.1,
        regulariser_weight=0.1,
        decoder_start=ranking["train_start"] / 100,
        encoder_start=by_name["loss_cl_enc"]["train_start"] / 100,
        regulariser_last=regulariser["train_end"] / 100,
        group_frames=ranking["group_frame"],
        num_neighbours=ranking["topk"],
        num_redundant=regulariser["k"],
    )
    contrast = SlotContrastConfig(weight=0.25, form="supcon")
    return Objective(ObjectiveConfig(slot_contrast=contrast, srl=config), max_steps=100)


@pytest.mark.parametrize("stage", ["reg_on_last", "none_on", "none_on_boundary", "cl_on_first"])
def test_stages(stage: str) -> None:
    tensors, meta = load("models/srl_stages.npz")
    model = build_model(meta, under(tensors, "param"), torch.float32)
    means = losses(model, objective_of(meta), tensors["features"], meta["stages"][stage]["batch_idx"])
    means["total"].backward()
    expected = {TERMS[name]: value for name, value in under(tensors, f"{stage}/loss").items()}
    expected["total"] = tensors[f"{stage}/total"]
    assert means.keys() == expected.keys()
    for name, value in expected.items():
        assert_values(means[name].detach(), value, name)
    if stage == "none_on_boundary":  # the file holds this stage's values alone
        return
    gradients = from_official(under(tensors, f"{stage}/grad"), model.state_dict())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert_gradient(parameter.grad, gradients[name], name)


def test_what_the_losses_read() -> None:
    tensors, meta = load("models/srl_stages.npz")
    output = build_model(meta, under(tensors, "param"), torch.float32)(tensors["features"])
    assert output.projected is not None and output.patch_maps is not None
    found = {
        "attn_over_patches": output.patch_maps,
        "feat_recon": output.projected.reconstruction,
        "feat_orig_dec": output.projected.target,
        "feat_trainable": output.projected.features,
    }
    for name, value in found.items():
        assert_values(value, tensors[name], name)
    assert not output.projected.target.requires_grad


def test_numbers_in_float64() -> None:
    features, target = waves((2, 4, 9, 8), 0.9, 0.1), waves((2, 4, 9, 8), 0.61, 0.4)
    maps, slots = waves((2, 4, 5, 9), 0.83, 0.2) * 2, waves((2, 4, 5, 8), 1.1, 0.6)
    output = output_of(features, target, target, maps)._replace(slots=slots)
    output = output._replace(patch_maps=(waves((2, 4, 5, 9), 0.47, 0.3) * 2).softmax(dim=3))
    found = [
        decoder_term(output, SRLConfig(group_frames=4)),
        decoder_term(output, SRLConfig(group_frames=2)),
        encoder_term(output, SRLConfig(group_frames=4, num_neighbours=2)),
        regulariser_term(output, SRLConfig(num_redundant=2)),
        slot_contrast(slots, slice(None), SlotContrastConfig(form="supcon")),
    ]
    expected = [13.9572602395, 13.1450934046, 17.4430106889, 0.5016305659, 2.4060724256]
    assert [float(value.sum / value.count) for value in found] == pytest.approx(expected, abs=1e-8)


def test_weights_serve_a_model_without_projectors() -> None:
    """Evaluation needs none of them: an SRL checkpoint fits the network of SlotContrast, and gives the same maps."""
    tensors, meta = load("models/srl_stages.npz")
    bare = {**meta, "config": {key: value for key, value in meta["config"].items() if key != "projector"}}
    model = build_model(bare, under(tensors, "param"), torch.float32)
    assert model.projector is None
    assert_values(model(tensors["features"]).object_maps(), tensors["decoder_masks"], "decoder_masks")
