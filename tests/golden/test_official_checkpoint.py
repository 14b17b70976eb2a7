"""A checkpoint as official SSync training writes it, from normalised frames to label maps and losses, against the official
model's own outputs: frozen ViT, feature transform, slots, decoder, selection and losses in one chain."""

from __future__ import annotations

import pathlib

import pytest
import torch
from golden_files import GOLDEN, assert_values, load
from torch import Tensor

from data_pipeline.features.vit import DinoVit, VitShape
from data_pipeline.features.weights import to_meta_layout
from trainer.config import MergeConfig, ModelConfig, ObjectiveConfig, SSyncConfig
from trainer.metrics.segmentation import label_map
from trainer.model.network import VideoSlotModel
from trainer.model.official_names import from_official
from trainer.objective import Objective

BACKBONE = "encoder.module.backbone.model."
LOSSES = {
    "loss_featrec": "feature_reconstruction",
    "loss_ss": "slot_contrast",
    "loss_grp2deccls": "ssync_boundary",
    "loss_dec2grpcls": "ssync_interior",
}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load("checkpoint/expected.npz")[0]


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    """The file's tensors. Its callbacks hold a path, the one class besides plain containers that is let through."""
    path = GOLDEN / "checkpoint" / "SSync_step7.ckpt"
    with torch.serialization.safe_globals([pathlib.PosixPath]):
        return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def features(expected, official) -> Tensor:
    """(1, T, P, E) from the file's own backbone. Its heads are 12 channels wide, which no DINOv2 has: the shape is given."""
    vit = DinoVit(VitShape(width=24, depth=12, heads=2, hidden=96))
    weights = {name.removeprefix(BACKBONE): value for name, value in official.items() if name.startswith(BACKBONE)}
    vit.load_state_dict(to_meta_layout(weights, pathlib.Path("official")))
    with torch.no_grad():
        return vit(expected["video"][0])[None]


@pytest.fixture(scope="module")
def output(features, official):
    model = VideoSlotModel(
        ModelConfig(num_slots=5, slot_dim=16, feature_dim=24, grid=[8, 8], predictor_heads=4, decoder_hidden=[40, 40, 40])
    )
    model.load_state_dict(from_official(official, model.state_dict()))
    with torch.no_grad():
        return model(features)


def test_every_tensor_of_the_file_is_used(official):
    assert len(official) == 217


def test_backbone(features, expected):
    assert_values(features, expected["backbone_features"], "backbone_features")


def test_model(output, expected):
    assert_values(output.slots, expected["slots"], "slots")
    assert_values(output.attn_maps(), expected["attn"], "attn")
    assert_values(output.reconstruction, expected["reconstruction"], "reconstruction")
    assert_values(output.object_maps(), expected["decoder_masks"], "decoder_masks")


def test_labels_at_full_size(output, expected):
    for maps, name in ((output.object_maps(), "decoder_labels_full_size"), (output.attn_maps(), "grouping_labels_full_size")):
        made = label_map(maps[0], (8, 8), (112, 112))
        # an arg-max between slots that agree to the last bits of float32 may fall either way
        assert (made == expected[name][0].long()).float().mean() > 0.999, name


def test_losses(output, expected):
    ssync = SSyncConfig(boundary_weight=1.0, interior_weight=1.0, merge=MergeConfig(threshold=0.7))
    objective = Objective(ObjectiveConfig(ssync=ssync), max_steps=10)
    terms = objective.local(output, step=7) | objective.coupled(output.slots, slice(0, 1), step=7)
    total = 0.0
    for official_name, name in LOSSES.items():
        value = terms[name].sum / terms[name].count
        assert value.item() == pytest.approx(expected[f"loss/{official_name}"].item(), rel=1e-4, abs=1e-6), name
        total += objective.weight(name, 7) * value.item()
    assert total == pytest.approx(expected["total"].item(), rel=1e-4)
