"""SSync's selection against a twin written with loops and sets, its flags one by one, and its bookkeeping."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.measure import peak_of_tensors
from trainer.config import MergeConfig, SSyncConfig
from trainer.kernels.label_error import label_error
from trainer.objective.slot_merging import merge_slots, slot_areas, visiting_order
from trainer.objective.ssync import (
    boundary_targets,
    boundary_term,
    count_neighbours,
    hard_labels,
    interior_targets,
    interior_term,
    select,
)

OFFSETS = [(0, y, x) for y, x in product((-1, 0, 1), repeat=2) if (y, x) != (0, 0)] + [(-1, 0, 0), (1, 0, 0)]


# ---- the twin: one clip at a time, plain Python ----------------------------------------------------------------------------


def twin_iou(values: Tensor) -> list[list[float]]:
    frames, num_slots, _ = values.shape
    above = values > values.mean(dim=(0, 2), keepdim=True)
    covered = [[set(above[t, s].nonzero().flatten().tolist()) for s in range(num_slots)] for t in range(frames)]

    def iou(t: int, a: int, b: int) -> float:
        shared = len(covered[t][a] & covered[t][b])
        return shared / (len(covered[t][a]) + len(covered[t][b]) + 2e-6 - shared)

    return [[sum(iou(t, a, b) for t in range(frames)) / frames for b in range(num_slots)] for a in range(num_slots)]


def twin_edges(attn: Tensor, obj: Tensor, merge: MergeConfig) -> list[set[int]]:
    as_read = (lambda logits: logits.softmax(dim=1)) if merge.space == "probs" else (lambda logits: logits)
    one, other = twin_iou(as_read(attn)), twin_iou(as_read(obj))
    both = twin_iou((attn.softmax(dim=1) + obj.softmax(dim=1)) / 2)
    rules = {
        "A": lambda a, b: one[a][b] > merge.threshold,
        "D": lambda a, b: other[a][b] > merge.threshold,
        "A_or_D": lambda a, b: one[a][b] > merge.threshold or other[a][b] > merge.threshold,
        "A_and_D": lambda a, b: one[a][b] > merge.threshold and other[a][b] > merge.threshold,
        "avg_map": lambda a, b: both[a][b] > merge.threshold,
        "avg_iou": lambda a, b: (one[a][b] + other[a][b]) / 2 > merge.threshold,
    }
    slots = range(attn.shape[1])
    return [{b for b in slots if b != a and rules[merge.source](a, b)} for a in slots]


def twin_components(edges: list[set[int]]) -> list[list[int]]:
    """Each component in the order in which a depth-first search with a stack visits it."""
    seen: set[int] = set()
    components = []
    for start in range(len(edges)):
        stack, component = [start], []
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                component.append(node)
                stack += sorted(edges[node] - seen)
        if component:
            components.append(component)
    return components


def twin_slot_map(edges: list[set[int]], areas: list[int], mode: str) -> list[int]:
    mapped = list(range(len(edges)))
    if mode == "transitive":
        for component in twin_components(edges):
            winner = max(component, key=lambda slot: areas[slot])  # max keeps the first of equals
            for slot in component:
                mapped[slot] = winner
    elif mode == "pairwise":
        for slot, near in enumerate(edges):
            larger = [other for other in sorted(near) if areas[other] > areas[slot]]
            mapped[slot] = max(larger, key=lambda other: areas[other], default=slot)
    return mapped


def twin_counts(labels: Tensor, border: str) -> tuple[Tensor, Tensor]:
    """labels (T, Y, X) -> how many neighbours differ and how many agree."""
    sizes = labels.shape
    different, equal = torch.zeros(sizes, dtype=torch.int8), torch.zeros(sizes, dtype=torch.int8)
    for place in product(*(range(size) for size in sizes)):
        for offset in OFFSETS:
            near = [at + step for at, step in zip(place, offset, strict=True)]
            inside = [min(max(at, 0), size - 1) for at, size in zip(near, sizes, strict=True)]
            if border == "ignore" and inside != near:
                continue
            agrees = labels[tuple(inside)] == labels[place]
            (equal if agrees else different)[place] += 1
    return different, equal


def random_logits(seed: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Smooth enough that neighbours agree now and then; some slots nearly copy others, so that there is much to merge."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    copies = torch.randint(shape[2], (shape[2],), generator=generator)
    logits = 0.7 * logits[:, :, :, copies] + 0.3 * logits
    return logits[0], logits[1]


sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(
    sizes,
    st.integers(0, 10_000),
    st.sampled_from(["A", "D", "A_or_D", "A_and_D", "avg_map", "avg_iou"]),
    st.sampled_from(["logits", "probs"]),
    st.sampled_from(["transitive", "pairwise", "none"]),
    st.sampled_from([0.2, 0.4, 0.6]),
    st.sampled_from(["clamp", "ignore"]),
    st.booleans(),
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)),
)
def test_selection_equals_its_twin(
    shape: tuple[int, ...],
    seed: int,
    source: str,
    space: str,
    mode: str,
    threshold: float,
    border: str,
    strict: bool,
    counts: tuple[int, ...],
) -> None:
    num_clips, frames, num_slots, rows, columns = shape
    attn, obj = random_logits(seed, (num_clips, frames, num_slots, rows * columns))
    merge = MergeConfig(source=source, space=space, mode=mode, threshold=threshold)
    min_different, min_equal, max_different = counts
    config = SSyncConfig(
        merge=merge,
        border=border,
        boundary_strict=strict,
        min_different=min_different,
        min_equal=min_equal,
        max_different=max_different,
    )
    chosen = select(attn, obj, (rows, columns), config)
    for clip in range(num_clips):
        attn_labels, object_labels = attn[clip].argmax(dim=1), obj[clip].argmax(dim=1)
        areas = [int((attn_labels == slot).sum()) for slot in range(num_slots)]
        mapped = torch.tensor(twin_slot_map(twin_edges(attn[clip], obj[clip], merge), areas, mode))
        assert chosen.slot_map[clip].tolist() == mapped.tolist()
        assert torch.equal(chosen.merged_attn_labels[clip], mapped[attn_labels])
        assert torch.equal(chosen.merged_object_labels[clip], mapped[object_labels])
        different, equal = twin_counts(mapped[attn_labels].unflatten(1, (rows, columns)), border)
        enough = different > min_different if strict else different >= min_different
        assert torch.equal(chosen.boundary[clip], (enough & (equal >= min_equal)).flatten(1))
        different, _ = twin_counts(mapped[object_labels].unflatten(1, (rows, columns)), border)
        assert torch.equal(chosen.interior[clip], (different < max_different).flatten(1))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10_000), st.sampled_from([0.1, 0.3, 0.6]))
def test_visiting_order_equals_a_stack_search(num_slots: int, seed: int, density: float) -> None:
    """Two graphs at once; within each component the order of visits is that of the search."""
    generator = torch.Generator().manual_seed(seed)
    upper = (torch.rand(2, num_slots, num_slots, generator=generator) < density).triu(1)
    edges = upper | upper.mT
    order = visiting_order(edges)
    for clip in range(2):
        twin = twin_components([set(edges[clip, slot].nonzero().flatten().tolist()) for slot in range(num_slots)])
        for component in twin:
            assert sorted(component, key=lambda slot: int(order[clip, slot])) == component
        assert sorted(order[clip].tolist()) == list(range(num_slots))


def test_equal_areas_go_to_the_first_in_visiting_order_not_to_the_lowest() -> None:
    """A path 0 - 1, 0 - 2: the search goes 0, 2, 1; 1 and 2 share the largest area, so 2 wins."""
    edges = [{1, 2}, {0}, {0}]
    assert twin_slot_map(edges, [1, 5, 5], "transitive") == [2, 2, 2]
    # The same through the real code: slots 1 and 2 overlap slot 0 but not each other.
    attn = torch.tensor([[1, 1, 1, 1, -1, -1, -1, -1], [2, 2, -1, -1, -1, -1, 0, -1], [-1, -1, 2, 2, -1, -1, -1, 0]]).double()
    labels = torch.tensor([[[1, 1, 2, 2, 0, 1, 2, 0]]])
    slot_map = merge_slots(attn[None, None], attn[None, None], labels, MergeConfig(threshold=0.2))
    assert slot_areas(labels, 3).tolist() == [[2, 3, 3]] and slot_map.tolist() == [[2, 2, 2]]


# ---- flags, one by one -----------------------------------------------------------------------------------------------------


def test_border_rules_at_a_corner() -> None:
    """One odd patch in the corner of a 2 x 3 picture. Clamped: itself counts as agreeing, straight neighbours count twice."""
    labels = torch.tensor([1, 0, 0, 0, 0, 0]).view(1, 1, 6)
    different, equal = count_neighbours(labels, (2, 3), "clamp")
    assert (different[0, 0, 0], equal[0, 0, 0]) == (5, 5)
    different, equal = count_neighbours(labels, (2, 3), "ignore")
    assert (different[0, 0, 0], equal[0, 0, 0]) == (3, 0)


def test_neighbours_in_time() -> None:
    labels = torch.zeros(1, 3, 25, dtype=torch.int64)
    labels[0, 1, 12] = 4
    different, _ = count_neighbours(labels, (5, 5), "clamp")
    assert different[0, :, 12].tolist() == [1, 10, 1]
    assert different.sum() == 2 * 10


def two_maps() -> tuple[Tensor, Tensor]:
    """Blocks of one label on 8 x 6 patches, a little ragged. In one map slots 1 and 4 nearly agree, in the other 1 and 3."""
    generator = torch.Generator().manual_seed(4)
    blocks = torch.randn(2, 1, 5, 2, 2, generator=generator, dtype=torch.float64)
    blocks[:, :, 4] = blocks[:, :, 1] + 0.1
    attn = blocks.repeat_interleave(4, dim=3).repeat_interleave(3, dim=4).expand(2, 3, 5, 8, 6)
    ragged = torch.randn(2, 2, 3, 5, 8, 6, generator=generator, dtype=torch.float64)
    return (attn + 0.3 * ragged[0]).flatten(3), (attn.roll(1, dims=3)[:, :, [0, 1, 2, 4, 3]] + 0.3 * ragged[1]).flatten(3)


GRID, PLAIN = (8, 6), SSyncConfig(merge=MergeConfig(threshold=0.5))


@pytest.mark.parametrize(
    "changes",
    [
        {"merge": MergeConfig(mode="none", threshold=0.5)},
        {"merge": MergeConfig(source="D", threshold=0.5)},
        {"merge": MergeConfig(space="probs", threshold=0.5)},
        {"min_different": 4},
        {"min_equal": 6},
        {"boundary_strict": True},
        {"border": "ignore"},
        {"max_different": 3},
    ],
)
def test_each_setting_changes_the_selection(changes: dict[str, object]) -> None:
    chosen, changed = (select(*two_maps(), GRID, config) for config in (PLAIN, replace(PLAIN, **changes)))
    moved = {name for name in chosen._fields if not torch.equal(getattr(chosen, name), getattr(changed, name))}
    assert not moved & {"attn_labels", "object_labels"}  # labels before merging are nobody's to change
    if "merge" in changes:
        assert "slot_map" in moved
    elif "border" in changes:
        assert moved and "slot_map" not in moved
    else:
        assert moved == ({"interior"} if "max_different" in changes else {"boundary"})


def test_strict_is_one_more_different_neighbour() -> None:
    strict, plain = SSyncConfig(boundary_strict=True, min_different=1), SSyncConfig(min_different=2)
    assert torch.equal(select(*two_maps(), GRID, strict).boundary, select(*two_maps(), GRID, plain).boundary)


def test_class_reduction_sum_is_s_times_mean() -> None:
    attn, obj = two_maps()
    for logits, value in ((obj, boundary_term), (attn, interior_term)):
        mean, total = SSyncConfig(max_different=9), SSyncConfig(max_different=9, class_reduction="sum")
        chosen = select(attn, obj, GRID, mean)
        assert value(logits, chosen, mean).sum > 0
        torch.testing.assert_close(5 * value(logits, chosen, mean).sum, value(logits, chosen, total).sum)


def test_temperature_sharpens_the_prediction() -> None:
    attn, obj = two_maps()
    config = PLAIN
    chosen = select(attn, obj, GRID, config)
    halved = boundary_term(obj, chosen, replace(config, temperature=0.5))
    torch.testing.assert_close(halved.sum, boundary_term(2 * obj, chosen, config).sum)


def test_loss_against_a_loop_and_gradients_stay_inside_the_sets() -> None:
    attn, obj = (logits.requires_grad_() for logits in two_maps())
    config = SSyncConfig(merge=MergeConfig(threshold=0.5), max_different=9)
    chosen = select(attn, obj, GRID, config)
    value = boundary_term(obj, chosen, config)
    maps = obj.detach().softmax(dim=2)
    expected = 0.0
    for b, t, p in chosen.boundary.nonzero().tolist():
        wanted = torch.zeros(5, dtype=torch.float64)
        wanted[chosen.merged_attn_labels[b, t, p]] = 1
        expected += float((maps[b, t, :, p] - wanted).square().mean())
    assert value.sum.item() == pytest.approx(expected) and value.count == chosen.boundary.sum() > 0
    value.sum.backward()
    assert attn.grad is None and obj.grad is not None
    assert not obj.grad[~chosen.boundary.unsqueeze(2).expand_as(obj)].any()
    interior_term(attn, chosen, config).sum.backward()
    assert attn.grad is not None and not attn.grad[~chosen.interior.unsqueeze(2).expand_as(attn)].any()


def test_zero_at_its_optimum() -> None:
    """Maps that agree and are certain: nothing left to learn."""
    logits = 200 * torch.nn.functional.one_hot(torch.tensor([0, 0, 2, 2, 1, 1]), 4).T.double()[None, None]
    config = SSyncConfig(merge=MergeConfig(mode="none"))
    chosen = select(logits, logits, (2, 3), config)
    assert boundary_term(logits, chosen, config).sum < 1e-12 and chosen.boundary.all()


def test_counts_and_sums_add_over_parts_of_the_batch() -> None:
    attn, obj = random_logits(5, (3, 2, 4, 12))
    config = SSyncConfig(merge=MergeConfig(threshold=0.5), max_different=6)

    def values(part: slice) -> list[Tensor]:
        chosen = select(attn[part], obj[part], (3, 4), config)
        terms = (boundary_term(obj[part], chosen, config), interior_term(attn[part], chosen, config))
        return [number for value in terms for number in value]

    whole = values(slice(None))
    assert all(number > 0 for number in whole)
    for cut in (0, 1, 2):
        for total, first, second in zip(whole, values(slice(0, cut)), values(slice(cut, None)), strict=True):
            torch.testing.assert_close(total, first + second)


def test_bf16_logits_under_autocast() -> None:
    attn, obj = (logits.bfloat16() for logits in two_maps())
    config = SSyncConfig(merge=MergeConfig(threshold=0.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = select(attn, obj, GRID, config)
        value = boundary_term(obj, low, config)
    exact = select(attn.float(), obj.float(), GRID, config)
    assert all(torch.equal(one, other) for one, other in zip(low, exact, strict=True))
    assert value.sum.dtype == torch.float32


# ---- labels, and the closed-form loss ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 10_000))
def test_labels_are_the_first_of_equal_maxima(num_slots: int, levels: int, seed: int) -> None:
    logits = torch.randint(levels, (2, 3, num_slots, 5), generator=torch.Generator().manual_seed(seed)).double()
    labels = hard_labels(logits)
    assert labels.dtype == torch.int8 and torch.equal(labels.long(), logits.argmax(dim=2))


def test_many_slots_and_broken_logits_give_labels_in_range() -> None:
    many = torch.randn(1, 1, 300, 4)
    assert torch.equal(hard_labels(many).long(), many.argmax(dim=2))
    broken = torch.full((1, 1, 5, 4), torch.nan)
    assert hard_labels(broken).min() >= 0 and hard_labels(broken).max() < 5
    config = SSyncConfig()
    chosen = select(broken, broken, (2, 2), config)
    assert boundary_term(broken, chosen, config).sum.isnan()  # said by the loss, not by an index out of range


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_closed_form_gradient(temperature: float) -> None:
    logits, _ = random_logits(2, (2, 3, 4, 5))
    logits.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (2, 3, 5), generator=generator).to(torch.int8)
    chosen = torch.rand(2, 3, 5, generator=generator) < 0.6
    wanted = torch.nn.functional.one_hot(labels.long(), 4).transpose(2, 3)
    plain = ((logits / temperature).softmax(dim=2) - wanted).square().sum(dim=2)[chosen].sum()
    closed = label_error(logits, labels, chosen, temperature)
    torch.testing.assert_close(closed, plain, rtol=1e-12, atol=1e-12)
    (expected,), (found,) = (torch.autograd.grad(3 * value, logits) for value in (plain, closed))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_boundary_needs_no_decoder_and_the_interior_only_its_labels() -> None:
    attn, obj = two_maps()
    whole = select(attn, obj, GRID, PLAIN)
    boundary, slot_map = boundary_targets(attn, GRID, PLAIN)
    interior = interior_targets(hard_labels(obj), slot_map, GRID, PLAIN)
    assert whole.boundary.any() and whole.interior.any()
    assert torch.equal(boundary.labels, whole.merged_attn_labels) and torch.equal(boundary.chosen, whole.boundary)
    assert torch.equal(interior.labels, whole.merged_object_labels) and torch.equal(interior.chosen, whole.interior)
    by_decoder = SSyncConfig(merge=MergeConfig(source="D", threshold=0.5))
    assert torch.equal(boundary_targets(attn, GRID, by_decoder, obj)[1], select(attn, obj, GRID, by_decoder).slot_map)


def test_memory_is_linear_in_the_patches() -> None:
    peaks = []
    for frames in (8, 16):
        attn, obj = (torch.randn(1, frames, 7, 256, requires_grad=True) for _ in range(2))

        def losses(attn: Tensor = attn, obj: Tensor = obj) -> None:
            chosen = select(attn, obj, (16, 16), PLAIN)
            (boundary_term(obj, chosen, PLAIN).sum + interior_term(attn, chosen, PLAIN).sum).backward()

        peaks.append(peak_of_tensors(losses, torch.device("cpu")).bytes)
    assert peaks[1] < 2.2 * peaks[0]
    assert peaks[1] < 9 * 16 * 7 * 256 * 4  # a few tensors as large as one map, both gradients among them
