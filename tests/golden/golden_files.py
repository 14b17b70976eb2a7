"""How the golden tests read their files and compare: README.md beside this file says what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config import ModelConfig
from trainer.model.network import VideoSlotModel
from trainer.model.official_names import from_official
from trainer.objective import Objective

GOLDEN = Path(__file__).resolve().parent


def load(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of one file."""
    with np.load(GOLDEN / path, allow_pickle=False) as file:
        tensors = {key: torch.from_numpy(np.array(file[key])) for key in file.files if key != "meta_json"}
        return tensors, json.loads(str(file["meta_json"]))


def names(folder: str) -> list[str]:
    return sorted(path.name for path in (GOLDEN / folder).glob("*.npz"))


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix/`, without it."""
    return {key.removeprefix(prefix + "/"): value for key, value in tensors.items() if key.startswith(prefix + "/")}


def assert_values(actual: Tensor, expected: Tensor, name: str) -> None:
    """Forward values: 1e-5 absolute + 1e-4 relative."""
    torch.testing.assert_close(actual.float(), expected.float(), atol=1e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}")


def assert_gradient(actual: Tensor, expected: Tensor, name: str) -> None:
    """Gradients: 1e-5 + 1e-3 of the tensor's largest entry."""
    limit = 1e-5 + 1e-3 * expected.abs().max().item()
    worst = (actual.double() - expected.double()).abs().max().item()
    assert worst <= limit, f"{name}: off by {worst:.3g}, limit {limit:.3g}"


def build_model(meta: dict[str, Any], official: dict[str, Tensor], dtype: torch.dtype) -> VideoSlotModel:
    """The network of a models/ file with its official parameters."""
    dims, config = meta["dims"], meta["config"]
    model = VideoSlotModel(
        ModelConfig(
            num_slots=dims["n_slots"],
            slot_dim=dims["slot_dim"],
            feature_dim=dims["feat_dim"],
            grid=[dims["H"], dims["W"]],
            iters_first=config["latent_processor"]["first_step_corrector_args"]["n_iters"],
            iters_next=config["grouper"]["n_iters"],
            predictor_heads=dims["heads"],
            decoder_hidden=list(dims["hidden"]),
            projectors="projector" in config,
            patch_maps="loss_reg" in config["losses"],
        )
    ).to(dtype)
    model.load_state_dict(from_official(official, model.state_dict()))
    return model


def losses(model: VideoSlotModel, objective: Objective, features: Tensor, step: int) -> dict[str, Tensor]:
    """Each active term's mean over this batch, and their weighted sum as `total`."""
    output = model(features)
    terms = objective.local(output, step) | objective.coupled(output.slots, slice(None), step)
    means = {name: value.sum / value.count.clamp(min=1).to(value.sum.dtype) for name, value in terms.items()}
    means["total"] = torch.stack([objective.weight(name, step) * mean for name, mean in means.items()]).sum()
    return means
