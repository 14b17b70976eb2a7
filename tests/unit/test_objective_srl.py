"""SRL's losses against twins that hold every pair of patches, their stages, and what they refuse."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.measure import peak_of_tensors
from data_pipeline.compose import compose
from data_pipeline.config import DataConfig
from data_pipeline.errors import ConfigError
from trainer.config import ModelConfig, ObjectiveConfig, RunConfig, SlotContrastConfig, SRLConfig
from trainer.kernels import ranking
from trainer.kernels.ranking import decoder_ranking, encoder_ranking, kth_largest
from trainer.model.network import VideoSlotModel
from trainer.model.outputs import ModelOutput, Projected
from trainer.objective import Objective, srl
from trainer.objective.slot_contrast import slot_contrast


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the twins: matrices of all pairs, autograd --------------------------------------------------------------------------


def twin_decoder(features: Tensor, targets: Tensor, labels: Tensor, temperature: float) -> Tensor:
    logits = normalize(features, dim=2) @ normalize(targets, dim=2).mT / temperature
    log_share = logits - logits.logsumexp(dim=2, keepdim=True)
    same = (labels[:, :, None] == labels[:, None]).double()
    own = log_share.diagonal(dim1=1, dim2=2)
    return -(own + (same * log_share).sum(dim=2) / same.sum(dim=2)).sum() / 2


def twin_encoder(features: Tensor, criterion: Tensor, labels: Tensor, temperature: float, num_neighbours: int) -> Tensor:
    others = 1 - torch.eye(features.shape[1], dtype=torch.float64)
    similar = normalize(criterion, dim=2) @ normalize(criterion, dim=2).mT
    near = (similar >= similar.topk(num_neighbours, dim=2).values[:, :, -1:]).double() * others
    same = (labels[:, :, None] == labels[:, None]).double() * others
    units = normalize(features, dim=2)
    logits = units @ units.mT / temperature
    log_share = logits - (logits.exp() * others).sum(dim=2, keepdim=True).log()
    return -sum((mask * log_share).sum(dim=2) / mask.sum(dim=2).clamp(min=1) for mask in (near, same)).sum() / 2


def assert_same(found: Tensor, expected: Tensor, features: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (mine,), (theirs,) = (torch.autograd.grad(value, features) for value in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(2, 30),
    st.integers(1, 5),
    st.sampled_from([0.1, 0.3]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.data(),
)
def test_ranking_equals_the_form_with_all_pairs(groups, tokens, num_labels, temperature, tile, data):
    """Values and gradients, however the pairs are cut into tiles, with labels that only one token or none has."""
    num_neighbours = data.draw(st.integers(1, tokens))
    features = draw(1, groups, tokens, 3).requires_grad_()
    targets, criterion = draw(2, groups, tokens, 3), draw(3, groups, tokens, 4)
    labels = torch.randint(num_labels, (groups, tokens), generator=torch.Generator().manual_seed(tokens)).to(torch.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "CPU_TILE", tile)
        patch.setattr(ranking, "CPU_ROW_BLOCK", tile[0] * tokens)
        assert_same(
            decoder_ranking(features, targets, labels, num_labels, temperature),
            twin_decoder(features, targets, labels, temperature),
            features,
        )
        assert_same(
            encoder_ranking(features, criterion, labels, num_labels, temperature, num_neighbours),
            twin_encoder(features, criterion, labels, temperature, num_neighbours),
            features,
        )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(0, 1000), st.integers(1, 40), st.data())
def test_kth_largest_is_exact_also_among_equals(columns, seed, levels, data):
    k = data.draw(st.integers(1, columns))
    values = torch.randint(levels, (3, columns), generator=torch.Generator().manual_seed(seed)).double()
    assert torch.equal(kth_largest(values, k), values.sort(dim=1, descending=True).values[:, k - 1 : k])


def test_equal_neighbours_are_all_neighbours():
    """Patches with the very same backbone feature, as a plain background has: twice a set of 20, of which 5 are asked for."""
    features, criterion = draw(4, 1, 40, 3).requires_grad_(), torch.eye(2, dtype=torch.float64).repeat(20, 1)[None]
    labels = torch.zeros(1, 40, dtype=torch.int8)
    assert_same(
        encoder_ranking(features, criterion, labels, 1, 0.1, 5), twin_encoder(features, criterion, labels, 0.1, 5), features
    )


def test_zero_vectors_and_single_tokens_stay_finite():
    features = torch.zeros(2, 1, 3, requires_grad=True)
    labels = torch.zeros(2, 1, dtype=torch.int8)
    total = decoder_ranking(features, features.detach(), labels, 2, 0.1)
    total = total + encoder_ranking(features, features.detach(), labels, 2, 0.1, 1)
    total.backward()
    assert total.isfinite() and features.grad is not None and features.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_memory_is_linear_in_the_tokens(kind, monkeypatch):
    """No block of the size of all pairs, and twice the tokens take about twice the memory."""
    monkeypatch.setattr(ranking, "CPU_TILE", (128, 256))
    monkeypatch.setattr(ranking, "CPU_ROW_BLOCK", 2**17)
    peaks = []
    for tokens in (1024, 2048):
        features = torch.randn(1, tokens, 8, requires_grad=True)
        criterion, labels = torch.randn(1, tokens, 8), torch.zeros(1, tokens, dtype=torch.int8)
        sizes = (1, 0.1) if kind == "decoder" else (1, 0.1, 8)
        call = decoder_ranking if kind == "decoder" else encoder_ranking
        peak = peak_of_tensors(lambda: call(features, criterion, labels, *sizes).backward(), torch.device("cpu"))  # noqa: B023
        assert peak.largest_block is not None and peak.largest_block < tokens * tokens
        peaks.append(peak.bytes)
    assert peaks[1] < 2.3 * peaks[0]


# ---- terms ---------------------------------------------------------------------------------------------------------------

CONFIG = SRLConfig(
    decoder_weight=0.1, encoder_weight=0.2, regulariser_weight=0.3, group_frames=2, num_neighbours=2, num_redundant=2
)


def random_output(clips: int = 3) -> ModelOutput:
    def of(seed: int, *shape: int) -> Tensor:
        return draw(seed, clips, 4, *shape)

    projected = Projected(of(1, 6, 8), of(2, 6, 8), of(3, 6, 8))
    maps = of(4, 5, 6).softmax(dim=3)
    return ModelOutput(of(5, 5, 8), of(6, 5, 6), of(7, 5, 6), of(8, 6, 7), of(9, 6, 7), (2, 3), projected, maps)


def cut(output: ModelOutput, start: int) -> ModelOutput:
    assert output.projected is not None and output.patch_maps is not None
    projected = Projected(*(tensor[start:] for tensor in output.projected))
    return ModelOutput(*(tensor[start:] for tensor in output[:5]), output.grid, projected, output.patch_maps[start:])


@pytest.mark.parametrize("name", srl.TERMS)
def test_terms_add_over_parts_of_the_batch(name):
    output, term = random_output(), srl.TERMS[name]
    whole, first, rest, nothing = (term(part, CONFIG) for part in (output, output.first(1), cut(output, 1), output.first(0)))
    torch.testing.assert_close(whole.sum, first.sum + rest.sum)
    assert whole.count == first.count + rest.count > 0
    assert nothing.sum == 0 and nothing.count == 0


def test_gradients_reach_what_each_term_teaches():
    output = random_output()
    assert output.projected is not None and output.patch_maps is not None
    leaves = {
        "srl_decoder": output.projected.reconstruction,
        "srl_encoder": output.projected.features,
        "srl_regulariser": output.patch_maps,
    }
    everything = [*output[:5], *output.projected, output.patch_maps]
    for tensor in everything:
        tensor.requires_grad_()
    for name, leaf in leaves.items():
        grads = torch.autograd.grad(srl.TERMS[name](output, CONFIG).sum, everything, allow_unused=True)
        taught = [tensor for tensor, grad in zip(everything, grads, strict=True) if grad is not None and grad.any()]
        assert len(taught) == 1 and taught[0] is leaf, name


def test_the_flatter_of_the_most_alike_goes_and_its_partner_stays():
    slots = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]])
    assert srl.redundant_slots(slots, torch.tensor([[0.5, 0.4, 0.1, 0.2]]), 2).tolist() == [[False, True, True, False]]
    assert srl.redundant_slots(slots, torch.tensor([[0.4, 0.4, 0.1, 0.2]]), 1).tolist() == [[True, False, False, False]]
    assert srl.redundant_slots(slots, torch.zeros(1, 4), 9).sum() == 3  # one slot is left


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0: "r", 10: "r", 11: "", 20: "", 21: "de", 99: "de"}),
        ({"regulariser_first": 0.025, "encoder_start": 0.0}, {0: "", 1: "e", 2: "er", 3: "er", 20: "e", 21: "de"}),
        ({"encoder_start": 0.0, "schedule": "paper_fraction"}, {0: "r", 10: "r", 11: "", 20: "", 21: "de"}),
        ({"decoder_weight": 0.0}, {21: "e"}),
    ],
)
def test_stages(changes, expected):
    config = replace(CONFIG, **changes)
    for step, letters in expected.items():
        weights = srl.weights(config, 100, step)
        assert "".join(sorted(name[4] for name, weight in weights.items() if weight)) == letters, step


def test_an_objective_with_srl_reads_whole_maps_only_while_it_must():
    objective = Objective(ObjectiveConfig(srl=CONFIG), max_steps=100)
    assert [objective.fits_one_pass(step) for step in (0, 10, 11, 20, 21)] == [False, False, True, True, False]
    assert set(objective.local(random_output(), 50)) == {"feature_reconstruction", "srl_decoder", "srl_encoder"}


def test_projectors_have_a_gradient_also_where_no_loss_reads_them():
    model = VideoSlotModel(ModelConfig(num_slots=3, slot_dim=8, feature_dim=5, grid=[2, 3], decoder_hidden=[7], projectors=True))
    output = model(torch.randn(2, 2, 6, 5))
    output.slots.sum().backward()
    assert model.projector is not None
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.projector.parameters())


@pytest.mark.parametrize("frames", [1, 2])
def test_recomputed_frames_give_the_same_views(frames):
    """Slot attention over segments of a clip: the same projections and patch maps."""
    settings_ = ModelConfig(
        num_slots=3, slot_dim=8, feature_dim=5, grid=[2, 3], decoder_hidden=[7], projectors=True, patch_maps=True
    )
    model, features = VideoSlotModel(settings_), torch.randn(2, 3, 6, 5)
    whole = model(features)
    model.recompute_frames = frames
    parts = model(features)
    torch.testing.assert_close(parts.patch_maps, whole.patch_maps)
    torch.testing.assert_close(tuple(parts.projected), tuple(whole.projected))


RELEASED = {  # experiment: neighbours, redundant slots, regulariser's first and last step, start of decoder and encoder, steps
    "srl_movi_c": (8, 5, 0, 10_000, 20_000, 20_000, 100_000),
    "srl_movi_e": (24, 7, 2_500, 30_000, 60_000, 60_000, 300_000),
    "srl_ytvis2021": (16, 3, 0, 10_000, 20_000, 0, 100_000),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_settings(name):
    config = compose("train", RunConfig, [f"experiment={name}"])
    near, redundant, first, last, decoder, encoder, steps = RELEASED[name]
    found = config.objective.srl
    assert (found.num_neighbours, found.num_redundant, found.group_frames, found.temperature) == (near, redundant, 4, 0.1)
    assert (found.decoder_weight, found.encoder_weight, found.regulariser_weight) == (0.1, 0.1, 0.1)
    assert (config.objective.slot_contrast.form, config.objective.slot_contrast.weight) == ("supcon", 0.25)
    assert (config.optim.lr, config.optim.global_batch, config.optim.max_steps) == (8e-4, 128, steps)
    assert config.name == name

    def active(step: int) -> set[str]:
        return {term for term, weight in srl.weights(found, steps, step).items() if weight}

    assert [("srl_regulariser" in active(step)) for step in (first - 1, first, last, last + 1)] == [False, True, True, False]
    for term, start in (("srl_decoder", decoder), ("srl_encoder", encoder)):
        assert term not in active(start) and term in active(start + 1)


def test_ssync_without_merging_but_with_the_regulariser():
    config = compose("train", RunConfig, ["experiment=ssync_movi_c", "objective=ssync_slot_reg"])
    terms, model = config.objective, config.model
    assert (terms.ssync.merge.mode, terms.ssync.boundary_weight, terms.ssync.interior_weight) == ("none", 1.0, 1.0)
    assert (terms.srl.regulariser_weight, terms.srl.decoder_weight, terms.srl.num_redundant) == (0.1, 0.0, 5)
    assert model.patch_maps and not model.projectors


# ---- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "model", "words"),
    [
        ({"decoder_weight": 0.1}, {"patch_maps": True}, "model.projectors=true"),
        ({"encoder_weight": 0.1}, {}, "model.projectors=true"),
        ({"regulariser_weight": 0.1}, {"projectors": True}, "model.patch_maps=true"),
        ({"decoder_weight": 0.1, "group_frames": 3}, {"projectors": True}, "group_frames=3 does not divide data.clip_len=4"),
        ({"encoder_weight": 0.1, "num_neighbours": 7}, {"projectors": True}, "num_neighbours=7; a frame has only 6 patches"),
    ],
)
def test_a_run_that_cannot_work_is_refused(changes, model, words):
    data = DataConfig(root="x", features="patch")
    with pytest.raises(ConfigError, match=words):
        RunConfig(data=data, model=ModelConfig(grid=[2, 3], **model), objective=ObjectiveConfig(srl=SRLConfig(**changes)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.01}, "temperature=0.01; at least 0.02"),
        ({"schedule": "late"}, "schedule"),
        ({"num_redundant": 0}, "num_redundant=0"),
        ({"encoder_start": 1.5}, "encoder_start=1.5; a share"),
    ],
)
def test_a_wrong_setting_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        SRLConfig(**changes)


# ---- slot contrast over all frames -----------------------------------------------------------------------------------------


def twin_tracks(slots: Tensor, own: range, temperature: float, scope: str) -> float:
    """One anchor at a time."""
    unit = normalize(slots, dim=3)
    clips, frames, num_slots, _ = slots.shape
    total = 0.0
    for clip in own:
        seen = range(clips) if scope != "video" else [clip]
        for frame in range(frames):
            for slot in range(num_slots):
                positives, compared = [], []
                for c, t, s in ((c, t, s) for c in seen for t in range(frames) for s in range(num_slots)):
                    logit = float(unit[clip, frame, slot] @ unit[c, t, s]) / temperature
                    if (c, s) != (clip, slot):
                        compared.append(logit)
                    elif abs(t - frame) == 1:
                        compared.append(logit)
                        positives.append(logit)
                total += float(torch.tensor(compared, dtype=torch.float64).logsumexp(0)) - sum(positives) / len(positives)
    return total * temperature / 0.07


@pytest.mark.parametrize("scope", ["global", "rank", "video"])
@pytest.mark.parametrize(("start", "stop"), [(0, 3), (1, 3), (2, 2)])
def test_contrast_of_all_frames_equals_its_twin(scope, start, stop, monkeypatch):
    slots = draw(1, 3, 4, 2, 6).requires_grad_()
    config = SlotContrastConfig(form="supcon", scope=scope, temperature=0.3)
    whole = slot_contrast(slots, slice(start, stop), config)
    assert float(whole.sum.detach()) == pytest.approx(twin_tracks(slots.detach(), range(start, stop), 0.3, scope), abs=1e-9)
    assert whole.count == (stop - start) * 8
    monkeypatch.setattr(sys.modules[slot_contrast.__module__], "BLOCK", 1)  # one clip's anchors at a time
    parts = slot_contrast(slots, slice(start, stop), config)
    torch.testing.assert_close(parts.sum, whole.sum)
    (found,), (expected,) = (torch.autograd.grad(value.sum, slots) for value in (parts, whole))
    torch.testing.assert_close(found, expected)
