"""The whole network in float64 against numbers of the released code: parameters are sines, so nothing is read from a file."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config import ModelConfig
from trainer.model.network import VideoSlotModel
from trainer.model.official_names import official_names

# Official names in the order in which the numbered sines were assigned.
ORDER = [
    *(f"encoder.output_transform.layers.{layer}.{kind}" for layer in (0, 1, 3) for kind in ("bias", "weight")),
    *(f"processor.corrector.gru.{name}" for name in ("bias_hh", "bias_ih", "weight_hh", "weight_ih")),
    *(f"processor.corrector.mlp.layers.{layer}.{kind}" for layer in (0, 1, 3) for kind in ("bias", "weight")),
    *(f"processor.corrector.{norm}.{kind}" for norm in ("norm_features", "norm_slots") for kind in ("bias", "weight")),
    *(f"processor.corrector.to_{role}.weight" for role in "kqv"),
    *(
        f"processor.predictor.blocks.0.{layer}.{kind}"
        for layer in ("linear1", "linear2", "norm1", "norm2", "self_attn.out_proj", "self_attn.qkv")
        for kind in ("bias", "weight")
    ),
    *(f"decoder.mlp.layers.{layer}.{kind}" for layer in (0, 2, 4, 6) for kind in ("bias", "weight")),
    "decoder.pos_emb",
]
# tensor: (sum, sum of absolute values, sum of squares)
EXPECTED = {
    "mapped": (-105.5348099394, 224.9647793050, 109.8001556929),
    "slots": (26.2721295684, 157.7703184301, 250.1765841097),
    "slots_predicted": (69.8008935849, 178.5748297076, 317.5034556399),
    "attn_logits": (136.9731029053, 146.3801244065, 123.1904913159),
    "attn_maps": (72.0, 72.0, 25.7808932927),
    "reconstruction": (32.4433054091, 347.4825632781, 209.3593912487),
    "object_maps": (72.0, 72.0, 24.4403532281),
    "object_logits": (-128.3775710118, 131.9005356863, 96.1030351225),
}


def waves(shape: tuple[int, ...], a: float, b: float, c: float = 1.0) -> Tensor:
    count = torch.Size(shape).numel()
    return (c * torch.sin(a * torch.arange(count, dtype=torch.float64) + b)).reshape(shape)


def build() -> VideoSlotModel:
    config = ModelConfig(num_slots=3, slot_dim=8, feature_dim=10, grid=[3, 4], decoder_hidden=[16, 16, 16])
    model = VideoSlotModel(config).double()
    ours = official_names(num_decoder_layers=4)
    state = model.state_dict()
    for k, official in enumerate(ORDER):
        name = ours[official]
        is_norm_weight = "norm" in name and name.endswith("weight")
        state[name] = waves(tuple(state[name].shape), 0.37, float(k), 0.25) + float(is_norm_weight)
    state["initializer.slots"] = waves((3, 8), 0.9, 0.3)
    assert len(ORDER) == len(state) - 1  # every parameter but the first queries
    model.load_state_dict(state)
    return model


def test_every_tensor_of_the_forward_pass() -> None:
    model = build()
    features = waves((2, 3, 12, 10), 0.21, 0.1)
    output = model(features)
    found = {
        "mapped": model.transform(features),
        "slots": output.slots,
        "slots_predicted": model.recurrence.predictor(output.slots.flatten(0, 1)),
        "attn_logits": output.attn_logits,
        "attn_maps": output.attn_maps(),
        "reconstruction": output.reconstruction,
        "object_maps": output.object_maps(),
        "object_logits": output.object_logits,
    }
    for name, expected in EXPECTED.items():
        tensor = found[name]
        measured = torch.stack([tensor.sum(), tensor.abs().sum(), tensor.square().sum()])
        wanted = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(measured, wanted, atol=1e-8, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_one_slot_entry_by_entry() -> None:
    expected = [-1.1334814276, -1.8682868664, -0.8902306850, -0.4997249655]
    expected += [2.2281082696, 1.0002413080, 2.2257041059, 0.2942670094]
    slots = build()(waves((2, 3, 12, 10), 0.21, 0.1)).slots
    torch.testing.assert_close(slots[0, 2, 1], torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)
