"""The objective: what is active when, and sums and counts that add up to the mean of the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.config import FeatureReconstructionConfig, ObjectiveConfig, SlotContrastConfig, SSyncConfig
from trainer.model.outputs import ModelOutput
from trainer.objective import Objective
from trainer.objective.slot_contrast import slot_contrast

SSYNC = SSyncConfig(boundary_weight=2.0, interior_weight=3.0, start_fraction=0.3)


def random_output(seed: int = 0, clips: int = 3) -> ModelOutput:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(clips, 2, *shape, generator=generator, dtype=torch.float64)

    return ModelOutput(draw(4, 8), draw(4, 6), draw(4, 6), draw(6, 5), draw(6, 5), (2, 3))


def random_slots() -> Tensor:
    return torch.randn(3, 4, 2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_gate_opens_at_the_start_fraction() -> None:
    objective = Objective(ObjectiveConfig(ssync=SSYNC), max_steps=10)
    names = [set(objective.local(random_output(), step)) for step in (0, 2, 3, 9)]
    base, full = {"feature_reconstruction"}, {"feature_reconstruction", "ssync_boundary", "ssync_interior"}
    assert names == [base, base, full, full]
    assert [objective.has_data_counts(step) for step in (2, 3)] == [False, True]
    assert [objective.weight("ssync_interior", step) for step in (2, 3)] == [0.0, 3.0]
    assert set(objective.coupled(random_slots(), slice(None), 0)) == {"slot_contrast"}


@pytest.mark.parametrize(
    ("config", "present"),
    [
        (ObjectiveConfig(), {"feature_reconstruction", "slot_contrast"}),
        (ObjectiveConfig(slot_contrast=SlotContrastConfig(weight=0.0)), {"feature_reconstruction"}),
        (ObjectiveConfig(feature_reconstruction=FeatureReconstructionConfig(weight=0.0)), {"slot_contrast"}),
        (
            ObjectiveConfig(ssync=SSyncConfig(boundary_weight=1.0, start_fraction=0.0)),
            {"feature_reconstruction", "slot_contrast", "ssync_boundary"},
        ),
        (
            ObjectiveConfig(ssync=SSyncConfig(interior_weight=1.0, start_fraction=0.0)),
            {"feature_reconstruction", "slot_contrast", "ssync_interior"},
        ),
    ],
)
def test_a_weight_of_zero_leaves_a_term_out(config: ObjectiveConfig, present: set[str]) -> None:
    objective = Objective(config, max_steps=5)
    terms = objective.local(random_output(), 0) | objective.coupled(random_slots(), slice(None), 0)
    assert set(terms) == present


def test_empty_sets_are_nan_only_where_asked() -> None:
    plain, released = (Objective(ObjectiveConfig(ssync=SSyncConfig(empty=rule)), 5) for rule in ("zero", "nan"))
    assert not plain.nan_when_empty("ssync_boundary") and released.nan_when_empty("ssync_boundary")
    assert not released.nan_when_empty("slot_contrast")


def test_local_terms_add_over_parts_of_the_batch() -> None:
    objective = Objective(ObjectiveConfig(ssync=SSYNC), max_steps=1)
    output = random_output()
    whole = objective.local(output, 5)
    parts = [output.first(1), ModelOutput(*(tensor[1:] for tensor in output[:5]), grid=output.grid)]
    for name, value in whole.items():
        for field in ("sum", "count"):
            total = sum(getattr(objective.local(part, 5)[name], field) for part in parts)
            torch.testing.assert_close(getattr(value, field), total, msg=lambda text, n=name: f"{n}: {text}")


def test_a_rank_without_real_clips_adds_nothing() -> None:
    objective = Objective(ObjectiveConfig(ssync=SSYNC), max_steps=1)
    nothing = random_output().first(0)
    terms = objective.local(nothing, 5) | objective.coupled(random_slots(), slice(3, 3), 5)
    assert len(terms) == 4
    assert all(value.sum == 0 and value.count == 0 for value in terms.values())


def test_reconstruction_is_the_mean_squared_error() -> None:
    output = random_output()
    value = Objective(ObjectiveConfig(), 5).local(output, 0)["feature_reconstruction"]
    torch.testing.assert_close(value.sum / value.count, torch.nn.functional.mse_loss(output.reconstruction, output.target))
    assert not value.count.requires_grad


def twin_contrast(slots: Tensor, own: range, config: SlotContrastConfig) -> tuple[float, int]:
    """One anchor at a time."""
    unit = slots / slots.norm(dim=3, keepdim=True)
    clips, frames, num_slots, _ = slots.shape
    total, count = 0.0, 0
    for clip in own:
        for earlier in range(frames - 1):
            anchor_frame, other_frame = earlier + 1, earlier
            if config.axis == "paper_earlier_anchor":
                anchor_frame, other_frame = other_frame, anchor_frame
            for slot in range(num_slots):
                seen = range(clips) if config.scope != "video" else [clip]
                logits = {
                    (c, s): float(unit[clip, anchor_frame, slot] @ unit[c, other_frame, s]) / config.temperature
                    for c in seen
                    for s in range(num_slots)
                }
                total += float(torch.tensor(list(logits.values())).double().logsumexp(0)) - logits[clip, slot]
                count += 1
    return total, count


@pytest.mark.parametrize("scope", ["global", "rank", "video"])
@pytest.mark.parametrize("axis", ["official_later_anchor", "paper_earlier_anchor"])
@pytest.mark.parametrize(("start", "stop"), [(0, 3), (0, 1), (1, 3), (2, 3)])
def test_contrast_equals_its_twin(scope: str, axis: str, start: int, stop: int) -> None:
    config = SlotContrastConfig(scope=scope, axis=axis, temperature=0.3)
    value = slot_contrast(random_slots(), slice(start, stop), config)
    total, count = twin_contrast(random_slots(), range(start, stop), config)
    assert float(value.sum) == pytest.approx(total, abs=1e-5) and value.count == count


def test_contrast_sums_over_anchor_clips_give_the_whole() -> None:
    """How ranks share the term: same candidates, own anchors; also their gradients add up."""
    config = SlotContrastConfig()
    slots = random_slots().requires_grad_()
    whole = slot_contrast(slots, slice(0, 3), config)
    parts = [slot_contrast(slots, own, config) for own in (slice(0, 1), slice(1, 1), slice(1, 3))]
    torch.testing.assert_close(whole.sum, sum(part.sum for part in parts))
    torch.testing.assert_close(whole.count, sum(part.count for part in parts))
    (expected,) = torch.autograd.grad(whole.sum, slots)
    (found,) = torch.autograd.grad(sum(part.sum for part in parts), slots)
    torch.testing.assert_close(found, expected)


def test_contrast_ignores_the_length_of_slots() -> None:
    lengths = torch.linspace(0.5, 3, 3 * 4 * 2, dtype=torch.float64).view(3, 4, 2, 1)
    one, other = (slot_contrast(slots, slice(None), SlotContrastConfig()) for slots in (random_slots(), random_slots() * lengths))
    torch.testing.assert_close(one.sum, other.sum)


@pytest.mark.parametrize("scope", ["global", "video"])
def test_one_frame_gives_no_contrast(scope: str) -> None:
    slots = random_slots()[:, :1].requires_grad_()
    value = slot_contrast(slots, slice(None), SlotContrastConfig(scope=scope))
    value.sum.backward()
    assert value.sum == 0 and value.count == 0 and slots.grad is not None and not slots.grad.any()
