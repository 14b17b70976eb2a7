"""SRL: patches rank patches. Its two ranking losses and its flattening of redundant slots.

ModelOutput with projections and patch maps comes in (model.projectors, model.patch_maps), terms go out. The decoder learns
which patches belong together from the attention labels (deblurring); the mapped features learn it from the object labels and
from the backbone's nearest neighbours (denoising).
Source: SRL and its released code, whose published schedules the experiments hold.
Differs: memory is linear in the number of patches, where the released code keeps several matrices of all pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from data_pipeline.errors import ConfigError
from trainer.config import SRLConfig
from trainer.kernels.ranking import decoder_ranking, encoder_ranking
from trainer.model.outputs import ModelOutput, Projected
from trainer.objective.ssync import hard_labels
from trainer.objective.terms import TermValue, term
from trainer.precision import at_least_float32, full_precision

BASE_TEMPERATURE = 0.07  # supervised contrast's convention: losses are multiplied by temperature / 0.07
LOG_EPS = 1e-8


def weights(config: SRLConfig, max_steps: int, step: int) -> dict[str, float]:
    """Weight of each term at `step`, the number of updates done before; 0 outside its stage.

    Source: SRL's released configurations: the regulariser counts from its first to its last step, both included; a ranking
    loss counts after its start.
    """
    shares = (config.regulariser_first, config.regulariser_last, config.decoder_start, config.encoder_start)
    if config.schedule == "paper_fraction":
        shares = (0.0, 0.1, 0.2, 0.2)
    first, last, decoder_start, encoder_start = (round(share * max_steps) for share in shares)
    return {
        "srl_decoder": config.decoder_weight if step > decoder_start else 0.0,
        "srl_encoder": config.encoder_weight if step > encoder_start else 0.0,
        "srl_regulariser": config.regulariser_weight if first <= step <= last else 0.0,
    }


def decoder_term(output: ModelOutput, config: SRLConfig) -> TermValue:
    """Deblurring: a reconstructed patch finds its own target, then the targets of its attention label. Mean over patches."""
    projected = _projected(output)
    with full_precision(projected.reconstruction):
        features, targets = (_groups(part, config) for part in (projected.reconstruction, projected.target))
        labels = _groups(hard_labels(at_least_float32(output.attn_logits)), config)
        total = decoder_ranking(features, targets, labels, output.attn_logits.shape[2], config.temperature)
        return term(total * (config.temperature / BASE_TEMPERATURE), labels.numel())


def encoder_term(output: ModelOutput, config: SRLConfig) -> TermValue:
    """Denoising: a mapped feature finds its nearest neighbours in the backbone's features, and its object label's patches.

    Source: SRL, released code: num_neighbours for each frame of the group, the patch itself counted among them.
    """
    projected = _projected(output)
    with full_precision(projected.features):
        features, criterion = (_groups(part, config) for part in (projected.features, output.target))
        labels = _groups(hard_labels(at_least_float32(output.object_logits)), config)
        near = config.num_neighbours * config.group_frames
        if near > labels.shape[1]:
            raise ConfigError(
                f"objective.srl.num_neighbours={config.num_neighbours}; a group of {config.group_frames} frames has only "
                f"{labels.shape[1]} patches, {near} are asked for; set it to {labels.shape[1] // config.group_frames} or less"
            )
        total = encoder_ranking(features, criterion, labels, output.object_logits.shape[2], config.temperature, near)
        return term(total * (config.temperature / BASE_TEMPERATURE), labels.numel())


def regulariser_term(output: ModelOutput, config: SRLConfig) -> TermValue:
    """Redundant slots spread over all patches: divergence of their patch maps from uniform. Mean over clips and frames."""
    if output.patch_maps is None:
        raise ConfigError(
            "objective.srl.regulariser_weight is above 0, but the network keeps no patch maps; set model.patch_maps=true"
        )
    with full_precision(output.slots):
        maps = at_least_float32(output.patch_maps)
        peaked = (maps * ((maps + LOG_EPS).log() + math.log(maps.shape[3]))).sum(dim=3)  # (B, T, S)
        picked = redundant_slots(at_least_float32(output.slots[:, -1]), peaked.mean(dim=1), config.num_redundant).to(maps.dtype)
        means = (peaked * picked.unsqueeze(1)).sum(dim=2) / picked.sum(dim=1, keepdim=True).clamp(min=1)
        return term(means.sum(), means.numel())


TERMS = {"srl_decoder": decoder_term, "srl_encoder": encoder_term, "srl_regulariser": regulariser_term}


@torch.no_grad()
def redundant_slots(slots: Tensor, peaked: Tensor, num_redundant: int) -> Tensor:
    """Which slots to flatten: of the two most alike that are left the flatter one goes, again and again. bool (B, S)

    Shapes: slots (B, S, D), the last frame's; peaked (B, S). At least one slot stays.
    """
    num_slots = slots.shape[1]
    unit = normalize(slots, dim=2)
    alike = unit @ unit.mT
    left = torch.ones(slots.shape[:2], dtype=torch.bool, device=slots.device)
    pairs = torch.ones(num_slots, num_slots, dtype=torch.bool, device=slots.device).triu(1)
    for _ in range(min(num_redundant, num_slots - 1)):
        candidates = alike.where(pairs & left.unsqueeze(1) & left.unsqueeze(2), -torch.inf)
        most_alike = candidates.flatten(1).argmax(dim=1, keepdim=True)
        ends = torch.cat([most_alike // num_slots, most_alike % num_slots], dim=1)  # the lower slot first
        first, second = peaked.gather(1, ends).unbind(1)
        flatter = ends[:, 0].where(first <= second, ends[:, 1])
        left &= ~one_hot(flatter, num_slots).bool()
    return ~left


def _projected(output: ModelOutput) -> Projected:
    if output.projected is None:
        raise ConfigError(
            "objective.srl.decoder_weight or encoder_weight is above 0, but the network has no projectors; "
            "set model.projectors=true"
        )
    return output.projected


def _groups(values: Tensor, config: SRLConfig) -> Tensor:
    """(B, T, P, ...) -> (groups, group_frames * P, ...), at least float32 or an integer: a clip is cut into groups of frames."""
    clips, frames, num_patches = values.shape[:3]
    if frames % config.group_frames:
        raise ConfigError(
            f"objective.srl.group_frames={config.group_frames}; it must divide a clip's frames, which are {frames}; "
            "change it or data.clip_len"
        )
    values = at_least_float32(values) if values.is_floating_point() else values
    return values.reshape(clips * frames // config.group_frames, config.group_frames * num_patches, *values.shape[3:])
