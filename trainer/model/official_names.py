"""Which tensor of an official SlotContrast, SSync or SRL checkpoint is which of ours.

Official names lose the `module.` level of their time wrappers first, so video and image models read alike. Shapes agree
but for leading axes of size one (first queries, decoder positions), which are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

BACKBONE = "encoder.backbone."  # the frozen backbone, which our model does not hold

_LAYERS = {
    "encoder.output_transform.layers.0": "transform.norm",
    "encoder.output_transform.layers.1": "transform.expand",
    "encoder.output_transform.layers.3": "transform.contract",
    "processor.corrector.mlp.layers.0": "recurrence.slot_attention.mlp.norm",
    "processor.corrector.mlp.layers.1": "recurrence.slot_attention.mlp.expand",
    "processor.corrector.mlp.layers.3": "recurrence.slot_attention.mlp.contract",
    "processor.corrector.norm_features": "recurrence.slot_attention.norm_features",
    "processor.corrector.norm_slots": "recurrence.slot_attention.norm_slots",
    "processor.predictor.blocks.0.self_attn.qkv": "recurrence.predictor.qkv",
    "processor.predictor.blocks.0.self_attn.out_proj": "recurrence.predictor.out",
    "processor.predictor.blocks.0.linear1": "recurrence.predictor.expand",
    "processor.predictor.blocks.0.linear2": "recurrence.predictor.contract",
    "processor.predictor.blocks.0.norm1": "recurrence.predictor.norm_attention",
    "processor.predictor.blocks.0.norm2": "recurrence.predictor.norm_mlp",
}

_WRAPPED = ("encoder", "processor", "decoder")  # what official video models apply frame by frame, one level down

_PROJECTORS = {"projector": "of_reconstruction", "projector2": "of_mapped"}  # SRL's alone


def official_names(num_decoder_layers: int) -> dict[str, str]:
    """Official name without `module.` -> our name, for a decoder of so many linear layers (hidden ones + 1)."""
    names = {"initializer.slots": "initializer.slots", "decoder.pos_emb": "decoder.positions"}
    names |= {f"{official}.projector.weight": f"projector.{ours}.weight" for official, ours in _PROJECTORS.items()}
    for official, ours in _LAYERS.items():
        names |= {f"{official}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}
    for role in ("q", "k", "v"):
        names[f"processor.corrector.to_{role}.weight"] = f"recurrence.slot_attention.to_{role}.weight"
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        names[f"processor.corrector.gru.{kind}"] = f"recurrence.slot_attention.gru.{kind}"
    for layer in range(num_decoder_layers):
        names |= {f"decoder.mlp.layers.{2 * layer}.{kind}": f"decoder.{kind}_{layer}" for kind in ("weight", "bias")}
    return names


def from_official(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors under our names and in our shapes; `like` is our model's state_dict. The backbone is left out.

    Raises ValueError if a tensor is unknown, missing or of another size.
    """
    names = official_names(sum(name.startswith("decoder.weight_") for name in like))
    ours: dict[str, Tensor] = {}
    for official, tensor in tensors.items():
        plain = official.replace(".module.", ".")
        if plain.startswith(BACKBONE):
            continue
        name = names.get(plain)
        if name is None:
            raise ValueError(
                f"tensor {official} is not part of a SlotContrast, SSync or SRL model; check which method wrote the file"
            )
        if name.startswith("projector.") and name not in like:
            continue  # training alone needs them, as it needs model.projectors=true
        if tensor.squeeze().shape != like[name].squeeze().shape:
            raise ValueError(
                f"tensor {official} has shape {tuple(tensor.shape)}; {name} needs {tuple(like[name].shape)}; "
                "set num_slots, slot_dim, feature_dim, grid and decoder_hidden to the file's"
            )
        ours[name] = tensor.reshape(like[name].shape)
    missing = sorted(set(like) - set(ours))
    if missing:
        raise ValueError(f"tensor for {missing[0]} is missing ({len(missing)} in all); the file is not a whole model")
    return ours


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names and in the shapes that official video models write, without the frozen backbone, which ours
    does not hold. The opposite of from_official.

    Raises ValueError for a tensor that official models do not have.
    """
    names = official_names(sum(name.startswith("decoder.weight_") for name in tensors))
    official = {ours: name for name, ours in names.items()}
    unknown = sorted(set(tensors) - set(official))
    if unknown:
        raise ValueError(f"tensor {unknown[0]} is not part of a SlotContrast, SSync or SRL model; use format=slotstream")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part, _, rest = official[name].partition(".")
        wrapped = f"{part}.module.{rest}" if part in _WRAPPED else official[name]
        axes = {"initializer.slots": 3, "decoder.positions": 4}.get(name, tensor.ndim)
        found[wrapped] = tensor.reshape((1,) * (axes - tensor.ndim) + tuple(tensor.shape))
    return found
