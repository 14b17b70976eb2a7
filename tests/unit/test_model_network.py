"""The network: shapes, invariants, flags, precision. Every axis has another size."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.errors import ConfigError
from trainer.config import ModelConfig, ObjectiveConfig, SSyncConfig
from trainer.model.decoder import MLPDecoder, fourier_positions
from trainer.model.network import VideoSlotModel
from trainer.model.official_names import from_official, official_names
from trainer.objective import Objective

SMALL = ModelConfig(
    num_slots=4, slot_dim=8, feature_dim=5, grid=[2, 3], decoder_hidden=[7, 9], predictor_heads=2, eval_decode_frames=2
)


def build(seed: int = 0, **changes: object) -> VideoSlotModel:
    torch.manual_seed(seed)
    return VideoSlotModel(replace(SMALL, **changes))


def clips(num_clips: int = 2, frames: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_clips, frames, 6, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_shapes() -> None:
    output = build()(clips())
    shapes = [tuple(part.shape) for part in output[:5]]
    assert shapes == [(2, 3, 4, 8), (2, 3, 4, 6), (2, 3, 4, 6), (2, 3, 6, 5), (2, 3, 6, 5)]
    assert output.grid == (2, 3) and not output.target.requires_grad


def test_maps_sum_to_one_over_slots() -> None:
    output = build()(clips())
    for maps in (output.attn_maps(), output.object_maps()):
        torch.testing.assert_close(maps.sum(dim=2), torch.ones(2, 3, 6))


def test_permuted_first_queries_permute_everything_but_the_reconstruction() -> None:
    model, order = build().double(), torch.tensor([2, 0, 3, 1])
    before = model(clips(dtype=torch.float64))
    with torch.no_grad():
        model.initializer.slots.copy_(model.initializer.slots[order])
    after = model(clips(dtype=torch.float64))
    for name in ("slots", "attn_logits", "object_logits"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name)[:, :, order])
    torch.testing.assert_close(after.reconstruction, before.reconstruction)


def test_clips_do_not_see_each_other_and_frames_do_not_see_later_ones() -> None:
    model, features = build(), clips()
    whole = model(features)
    torch.testing.assert_close(model(features[1:]).slots, whole.slots[1:])
    torch.testing.assert_close(model(features[:, :2]).attn_logits, whole.attn_logits[:, :2])


def test_one_frame_takes_the_first_frames_iterations() -> None:
    features = clips()
    torch.testing.assert_close(build()(features[:, :1]).slots[:, 0], build()(features).slots[:, 0])


@pytest.mark.parametrize("changes", [{"iters_first": 4}, {"iters_next": 1}])
def test_iteration_counts_reach_their_frames(changes: dict[str, int]) -> None:
    plain, changed = build()(clips()).slots, build(**changes)(clips()).slots
    same_first = torch.equal(plain[:, 0], changed[:, 0])
    assert same_first == ("iters_next" in changes)
    assert not torch.allclose(plain[:, 1], changed[:, 1])


@pytest.mark.parametrize("changes", [{"gru_hidden": "raw"}, {"attention_scale": "standard"}, {"decoder_positions": "fourier"}])
def test_each_flag_changes_the_output(changes: dict[str, str]) -> None:
    plain, changed = build()(clips()), build(**changes)(clips())
    assert not torch.allclose(plain.reconstruction, changed.reconstruction, atol=1e-6)
    if "attention_scale" in changes:  # the predictor first speaks in the second frame
        assert torch.equal(plain.slots[:, 0], changed.slots[:, 0])


def test_predictor_scales() -> None:
    """Released: products times sqrt(d_head); standard: divided by it."""
    assert build().recurrence.predictor.scale == pytest.approx(math.sqrt(8 / 2))
    assert build(attention_scale="standard").recurrence.predictor.scale == pytest.approx(1 / math.sqrt(8 / 2))


def test_query_key_gain_multiplies_the_first_weights() -> None:
    plain, sharp = build().recurrence.slot_attention, build(query_key_gain=3.0).recurrence.slot_attention
    for name in ("to_q", "to_k"):
        torch.testing.assert_close(getattr(sharp, name).weight, 3 * getattr(plain, name).weight)
    assert torch.equal(sharp.to_v.weight, plain.to_v.weight)


def test_gru_equals_pytorchs_gates_written_out() -> None:
    """Gate order r, z, n; the hidden state is the normalised slots."""
    attention = build().recurrence.slot_attention
    queries, keys, values = torch.randn(2, 4, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    slots, logits = attention(queries, keys, values, 1)
    normed = attention.norm_slots(queries)
    expected_logits = torch.einsum("bsd,bpd->bsp", normed @ attention.to_q.weight.T, keys) / math.sqrt(8)
    torch.testing.assert_close(logits, expected_logits)
    maps = expected_logits.softmax(dim=1) + 1e-8
    read = torch.einsum("bsp,bpd->bsd", maps / maps.sum(dim=2, keepdim=True), values)
    gru = attention.gru
    of_input = (read @ gru.weight_ih.T + gru.bias_ih).chunk(3, dim=2)
    of_hidden = (normed @ gru.weight_hh.T + gru.bias_hh).chunk(3, dim=2)
    reset, update = (of_input[0] + of_hidden[0]).sigmoid(), (of_input[1] + of_hidden[1]).sigmoid()
    updated = (1 - update) * (of_input[2] + reset * of_hidden[2]).tanh() + update * normed
    torch.testing.assert_close(slots, attention.mlp(updated))


@pytest.mark.parametrize("hidden", [[7], [7, 9], [7, 9, 11]])
def test_decoder_equals_the_plain_broadcast_decoder(hidden: list[int]) -> None:
    """The two factored layers against slot + position through every layer at every patch, values and gradients."""
    torch.manual_seed(2)
    decoder = MLPDecoder(8, 5, hidden, (2, 3)).double()
    slots = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    weights = [slots, *decoder.parameters()]
    found = decoder(slots)
    x = slots.unsqueeze(2) + decoder.positions
    for index in range(decoder.num_layers):
        weight, bias = decoder.layer(index)
        x = x @ weight.T + bias
        x = x.relu() if index < decoder.num_layers - 1 else x
    logits = x[..., -1]
    expected = (torch.einsum("nsp,nspe->npe", logits.softmax(dim=1), x[..., :-1]), logits)
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain)
    mine, plain = (torch.autograd.grad(sum((part.sin() * 3).sum() for part in pair), weights) for pair in (found, expected))
    for name, one, other in zip(["slots", *dict(decoder.named_parameters())], mine, plain, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, n=name: f"{n}: {text}")


def test_segment_equals_forward_and_keeps_no_graph() -> None:
    model = build()
    whole = model(clips())
    for chunk in (None, 1, 4, 100):
        chunked = model.segment(clips(), chunk)
        assert not chunked.slots.requires_grad
        for mine, plain in zip(chunked[:5], whole[:5], strict=True):
            torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (2, 3, 6, 4), (2, 6, 5)])
def test_other_shapes_are_refused_in_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"model.grid and model.feature_dim") as error:
        build()(torch.zeros(shape))
    assert str(shape) in str(error.value) and "\n" not in str(error.value)


def test_half_precision_features_are_read_in_float32() -> None:
    features = clips().half()
    output = build()(features)
    assert output.target.dtype == output.slots.dtype == torch.float32
    torch.testing.assert_close(output.slots, build()(features.float()).slots)


def kept_bytes(model: VideoSlotModel, frames: int) -> int:
    """Bytes that autograd keeps of the encoder, without features and parameters."""
    features = clips(1, frames)
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model._encode(features)
    for known in (features, *model.parameters()):
        storages.pop(known.untyped_storage().data_ptr(), None)
    assert output[0].requires_grad
    return sum(storages.values())


def test_what_the_encoder_keeps_of_a_frame_is_counted() -> None:
    """Of a patch: the transform's two inputs, mapped features, keys, values, and per iteration two numbers a slot. Of a frame's
    slots less than 80 vectors. With recomputation, a slot vector a frame."""
    width, dim, slots, patches, iterations = 5, 8, 4, 6, 2
    a_patch = width + 2 * width + 4 * dim + 2 * slots * iterations + 4
    of_slots = iterations * 40 * slots * dim
    grown = (kept_bytes(build(), 9) - kept_bytes(build(), 5)) / 4 / 4  # numbers a frame
    assert patches * a_patch * 0.8 <= grown <= patches * a_patch + of_slots
    again = (kept_bytes(build(recompute_frames=1), 9) - kept_bytes(build(recompute_frames=1), 5)) / 4 / 4
    assert again <= 2 * slots * dim


class FullSize(TorchDispatchMode):
    """How many tensors of at least so many entries operations make."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.count = entries, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            self.count += isinstance(tensor, Tensor) and not tensor._is_view() and tensor.numel() >= self.entries
        return made


def test_tensors_of_the_whole_clip_do_not_multiply_with_its_length() -> None:
    """Indexing frame after frame would make one for every frame in the backward: quadratic in T."""
    counts = []
    for frames in (8, 20):
        model = build()
        with FullSize(frames * 6 * 8) as made:
            model._encode(clips(1, frames))[0].square().sum().backward()
        counts.append(made.count)
    assert counts[0] == counts[1] < 50


@pytest.mark.parametrize("frames", [1, 2, 3, 7])
def test_recomputed_frames_change_neither_values_nor_gradients(frames: int) -> None:
    models = [build().double(), build(recompute_frames=frames).double()]
    features = clips(2, 5, torch.float64)
    totals = [total_loss(model, features) for model in models]
    torch.testing.assert_close(*totals, rtol=1e-12, atol=0)
    for total in totals:
        total.backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


def full_objective() -> Objective:
    ssync = SSyncConfig(boundary_weight=1.0, interior_weight=1.0, start_fraction=0.0)
    return Objective(ObjectiveConfig(ssync=ssync), max_steps=10)


def total_loss(model: VideoSlotModel, features: Tensor) -> Tensor:
    output, objective = model(features), full_objective()
    terms = objective.local(output, 0) | objective.coupled(output.slots, slice(None), 0)
    assert set(terms) == {"feature_reconstruction", "slot_contrast", "ssync_boundary", "ssync_interior"}
    return sum(objective.weight(name, 0) * value.sum / value.count.clamp(min=1) for name, value in terms.items())  # type: ignore[return-value]


def test_gradients_reach_every_parameter() -> None:
    model = build()
    total_loss(model, clips()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_bf16_autocast_is_finite_and_keeps_logits_in_float32() -> None:
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(clips())
        loss = total_loss(model, clips())
    assert output.slots.dtype == output.attn_logits.dtype == output.object_logits.dtype == torch.float32
    assert output.reconstruction.dtype == torch.bfloat16  # the wide layers did run in bf16
    assert loss.isfinite()
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(output.slots, model(clips()).slots, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 3_064_321),
        ({"num_slots": 15, "slot_dim": 128, "feature_dim": 768}, 4_953_601),
        ({"num_slots": 7, "feature_dim": 768, "grid": [37, 37]}, 4_443_841),
        ({"num_slots": 7, "grid": [16, 16], "decoder_hidden": [2048, 2048, 2048]}, 9_797_889),
    ],
    ids=["movi_c", "movi_e", "ytvis2021", "coco2017"],
)
def test_published_parameter_counts(settings: dict[str, object], count: int) -> None:
    with torch.device("meta"):
        model = VideoSlotModel(ModelConfig(**settings))  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == count


def test_first_weights_have_the_released_spread() -> None:
    """Queries and positions N(0, 1/D); linear layers uniform within 1/sqrt(fan in), biases too; qkv Xavier, bias 0."""
    torch.manual_seed(0)
    model = VideoSlotModel(ModelConfig(num_slots=50, slot_dim=64, feature_dim=32, grid=[10, 11], decoder_hidden=[48]))
    assert model.initializer.slots.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert model.decoder.positions.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert 0.9 * 64**-0.5 < model.decoder.bias_0.abs().max().item() <= 64**-0.5
    assert 0.9 * 48**-0.5 < model.decoder.weight_1.abs().max().item() <= 48**-0.5
    assert 0.9 * 32**-0.5 < model.transform.expand.bias.abs().max().item() <= 32**-0.5
    predictor = model.recurrence.predictor
    for layer in (predictor.qkv, predictor.out):
        assert 0.95 * (6 / 128) ** 0.5 < layer.weight.abs().max().item() <= (6 / 128) ** 0.5
        assert not layer.bias.any()


def test_fourier_positions_tell_all_patches_apart() -> None:
    table = fourier_positions((3, 4), 10)
    assert table.shape == (12, 10) and table.abs().max() <= 1
    assert torch.cdist(table, table).fill_diagonal_(9).min() > 0.3
    torch.testing.assert_close(table[5, :2], torch.tensor([math.sin(math.pi / 2), math.cos(math.pi / 2)]), atol=1e-6, rtol=0)


def official_tensors(model: VideoSlotModel) -> dict[str, Tensor]:
    """As a released checkpoint names and shapes them, with a backbone tensor that is to be left out."""
    state, named = model.state_dict(), official_names(num_decoder_layers=3)
    own = {official: ours for official, ours in named.items() if ours in state}
    tensors = {official.replace("processor.", "processor.module.", 1): state[ours] + 1 for official, ours in own.items()}
    tensors["decoder.pos_emb"] = tensors["decoder.pos_emb"][None, None]
    return tensors | {"encoder.module.backbone.model.cls_token": torch.zeros(1)}


def test_official_names_cover_the_model() -> None:
    model = build()
    ours = from_official(official_tensors(model), model.state_dict())
    assert ours.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours[name], tensor + 1)


@pytest.mark.parametrize("damage", ["unknown", "missing", "shape"])
def test_official_tensors_that_do_not_fit(damage: str) -> None:
    model = build()
    tensors = official_tensors(model)
    if damage == "unknown":
        tensors["projector.weight"] = torch.zeros(2)
    elif damage == "missing":
        del tensors["initializer.slots"]
    else:
        tensors["initializer.slots"] = tensors["initializer.slots"].T
    with pytest.raises(ValueError, match="projector.weight" if damage == "unknown" else "initializer.slots"):
        from_official(tensors, model.state_dict())
