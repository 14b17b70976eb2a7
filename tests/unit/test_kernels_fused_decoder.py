"""The chunked decoder against its plain twin: values, every gradient, precision, and what it never makes. Axes differ in size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.kernels import fused_decoder, products
from trainer.kernels.fused_decoder import chunks
from trainer.kernels.products import OneDnnProducts, Products, choose_products, onednn_is_right
from trainer.model.decoder import MLPDecoder
from trainer.model.outputs import Decoded, DecoderTask

DIM, WIDTH = 6, 5


def make(hidden: Sequence[int] = (7, 9, 8), grid: tuple[int, int] = (3, 4), path: str = "fused", rows: int = 0) -> MLPDecoder:
    torch.manual_seed(3)
    return MLPDecoder(DIM, WIDTH, hidden, grid, path=path, chunk_rows=rows).double()


def inputs(clips: int = 2, frames: int = 3, slots: int = 4, patches: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slots, target, labels, chosen"""
    draw = torch.Generator().manual_seed(4)
    return (
        torch.randn(clips, frames, slots, DIM, generator=draw, dtype=torch.float64),
        torch.randn(clips, frames, patches, WIDTH, generator=draw, dtype=torch.float64),
        torch.randint(slots, (clips, frames, patches), generator=draw).to(torch.int8),
        torch.rand(clips, frames, patches, generator=draw) < 0.4,
    )


def plain_loss(decoder: MLPDecoder, slots: Tensor, target: Tensor, task: DecoderTask) -> tuple[Tensor, Tensor, Tensor]:
    """The task's loss by autograd on whole maps; the two sums; object logits (n, T, S, P)."""
    slots, target = slots[: task.num_real], target[: task.num_real]
    reconstruction, logits = decoder._whole(slots.flatten(0, 1))
    logits = logits.unflatten(0, slots.shape[:2])
    error = (reconstruction.view_as(target) - target).square().mean(dim=3).sum()
    boundary = error.new_zeros(())
    if task.labels is not None:
        maps = (logits / task.temperature).softmax(dim=2)
        wanted = one_hot(task.labels.long(), slots.shape[2]).transpose(2, 3)
        boundary = ((maps - wanted).square().sum(dim=2) * task.chosen).sum()
    return task.reconstruction * error + task.boundary * boundary, torch.stack([error, boundary]).detach(), logits


def gradients_of(loss: Tensor, slots: Tensor, decoder: MLPDecoder) -> dict[str, Tensor]:
    named = {"slots": slots, **dict(decoder.named_parameters())}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def one_pass(decoder: MLPDecoder, slots: Tensor, target: Tensor, task: DecoderTask) -> tuple[dict[str, Tensor], Decoded]:
    carrier, decoded = decoder(slots, task, target)
    assert carrier == 0
    return gradients_of(carrier, slots, decoder), decoded


def wide(value: float) -> Tensor:
    """A share as the step makes it."""
    return torch.tensor(value, dtype=torch.float64)


TASKS: dict[str, Callable[[Tensor, Tensor], DecoderTask]] = {
    "both": lambda labels, chosen: DecoderTask(2, 0.3, wide(0.7), labels, chosen),
    "warm-up": lambda labels, chosen: DecoderTask(2, 0.3),
    "boundary alone": lambda labels, chosen: DecoderTask(2, 0.0, wide(1.5), labels, chosen),
    "temperature": lambda labels, chosen: DecoderTask(2, 0.3, wide(0.7), labels, chosen, temperature=0.4),
    "empty set": lambda labels, chosen: DecoderTask(2, 0.3, wide(2.0), labels, torch.zeros_like(chosen)),
    "a clip of padding": lambda labels, chosen: DecoderTask(1, 0.3, wide(0.7), labels[:1], chosen[:1]),
    "padding alone": lambda labels, chosen: DecoderTask(0, 0.3, wide(0.7), labels[:0], chosen[:0]),
}


@pytest.mark.parametrize("hidden", [(7,), (7, 9), (7, 9, 8, 10)], ids=str)
@pytest.mark.parametrize("name", TASKS)
def test_one_pass_equals_the_plain_twin(name: str, hidden: tuple[int, ...]) -> None:
    slots, target, labels, chosen = inputs()
    slots.requires_grad_()
    task, decoder = TASKS[name](labels, chosen), make(hidden, rows=17)
    found, decoded = one_pass(decoder, slots, target, task)
    loss, sums, logits = plain_loss(decoder, slots, target, task)
    torch.testing.assert_close(torch.stack([decoded.reconstruction_error, decoded.boundary_error]), sums, rtol=1e-12, atol=1e-12)
    assert decoded.object_labels.dtype == torch.int8 and decoded.gradients == ()
    assert torch.equal(decoded.object_labels[: task.num_real].long(), logits.argmax(dim=2))
    expected = gradients_of(loss, slots, decoder)
    largest = max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10 * largest, msg=lambda text, k=key: f"{k}: {text}")


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 300),
    slots=st.integers(1, 6),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    frames=st.integers(1, 4),
)
def test_the_size_of_chunks_changes_nothing(rows: int, slots: int, grid: tuple[int, int], frames: int) -> None:
    patches = grid[0] * grid[1]
    values, target, labels, chosen = inputs(1, frames, slots, patches)
    values.requires_grad_()
    task = DecoderTask(1, 0.3, 0.7, labels, chosen)
    one, other = (one_pass(make(grid=grid, rows=size), values, target, task) for size in (rows, 10**6))
    for key, value in one[0].items():
        torch.testing.assert_close(other[0][key], value, rtol=1e-10, atol=1e-12, msg=lambda text, k=key: f"{k}: {text}")
    assert torch.equal(one[1].object_labels, other[1].object_labels)


@settings(max_examples=200, deadline=None)
@given(frames=st.integers(0, 9), patches=st.integers(1, 70), slots=st.integers(1, 12), rows=st.integers(1, 900))
def test_chunks_cover_every_patch_once(frames: int, patches: int, slots: int, rows: int) -> None:
    seen = torch.zeros(frames, patches)
    for chunk in chunks(frames, patches, slots, rows):
        seen[chunk] += 1
        assert seen[chunk].numel() * slots <= max(rows, slots)
    assert bool((seen == 1).all())


@pytest.mark.parametrize("hidden", [(7,), (7, 9, 8)], ids=str)
def test_any_gradient_through_the_maps_equals_the_plain_twin(hidden: tuple[int, ...]) -> None:
    """The path with recomputation: losses that are not known before."""
    slots = inputs()[0].flatten(0, 1).requires_grad_()
    found = []
    for path in ("fused", "plain"):
        decoder = make(hidden, path=path, rows=19)
        reconstruction, logits = decoder(slots)
        loss = (reconstruction.sin() * 3).sum() + (logits.softmax(dim=1) ** 3).sum() + (reconstruction.mean() * logits.max())
        found.append({"reconstruction": reconstruction, "logits": logits, **gradients_of(loss, slots, decoder)})
    for key, value in found[1].items():
        torch.testing.assert_close(found[0][key], value, rtol=1e-10, atol=1e-12, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["auto", "torch", "onednn"])
def test_float32_is_no_worse_than_twice_the_plain_twin(name: str, recomputed: bool) -> None:
    torch.manual_seed(0)
    decoder = MLPDecoder(16, 24, [160, 160, 160], (6, 6), chunk_rows=180, products=name)
    slots, target, labels, chosen = torch.randn(1, 3, 5, 16), torch.randn(1, 3, 36, 24), *(part[:1] for part in labels_of(36))
    task = DecoderTask(1, 0.01, 0.02, labels, chosen)
    slots.requires_grad_()
    if recomputed:
        reconstruction, logits = decoder(slots.flatten(0, 1))
        error = (reconstruction - target[0]).square().mean(dim=2).sum()
        wanted = one_hot(labels[0].long(), 5).transpose(1, 2)
        boundary = ((logits.softmax(dim=1) - wanted).square().sum(dim=1) * chosen[0]).sum()
        fused = gradients_of(0.01 * error + 0.02 * boundary, slots, decoder)
    else:
        fused = one_pass(decoder, slots, target, task)[0]
    plain = gradients_of(plain_loss(decoder, slots, target, task)[0], slots, decoder)
    decoder.double()
    exact_slots = slots.detach().double().requires_grad_()
    exact = gradients_of(plain_loss(decoder, exact_slots, target.double(), task)[0], exact_slots, decoder)
    for key, value in exact.items():
        scale = value.norm().clamp(min=1e-30)
        errors = [float((each[key].double() - value).norm() / scale) for each in (fused, plain)]
        assert errors[0] <= 2 * errors[1] + 2e-7, (key, errors)


def labels_of(patches: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randint(5, (1, 3, patches), generator=draw).to(torch.int8), torch.rand(1, 3, patches, generator=draw) < 0.4


def test_bf16_products_are_close_and_sums_stay_float32() -> None:
    torch.manual_seed(0)
    decoder = MLPDecoder(16, 24, [64, 64, 64], (6, 6), chunk_rows=180)
    slots, target = torch.randn(1, 3, 5, 16, requires_grad=True), torch.randn(1, 3, 36, 24)
    task = DecoderTask(1, 0.01, 0.02, *labels_of(36))
    exact, _ = one_pass(decoder, slots, target, task)
    with torch.autocast("cpu", torch.bfloat16):
        carrier, decoded = decoder(slots, task, target)
        narrow = decoder(slots.flatten(0, 1))
    found = gradients_of(carrier, slots, decoder)
    assert narrow[0].dtype == torch.bfloat16 and narrow[1].dtype == torch.float32
    assert {value.dtype for value in found.values()} == {torch.float32}
    for key, value in exact.items():
        assert float((found[key] - value).norm()) <= 0.06 * float(value.norm()) + 1e-5, key
    changed = any(not torch.allclose(found[key], exact[key], rtol=1e-5) for key in exact)
    assert changed, "the wide products did not run in bf16"


def test_slots_that_are_used_elsewhere_get_both_gradients() -> None:
    values, target, labels, chosen = inputs()
    slots, decoder, task = values.requires_grad_(), make(), DecoderTask(2, 0.3, 0.7, labels, chosen)
    alone = one_pass(decoder, slots, target, task)[0]["slots"]
    carrier, _ = decoder(slots * 2, task, target)
    doubled = one_pass(decoder, (slots * 2).detach().requires_grad_(), target, task)[0]["slots"]
    (found,) = torch.autograd.grad(carrier * 5 + slots.square().sum(), slots)
    torch.testing.assert_close(found, 10 * doubled + 2 * slots.detach())
    assert not torch.allclose(alone, doubled)


def test_a_second_backward_is_refused() -> None:
    slots, target, labels, chosen = inputs()
    carrier, _ = make()(slots.requires_grad_(), DecoderTask(2, 0.3, 0.7, labels, chosen), target)
    carrier.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        carrier.backward()


def test_without_grad_mode_the_gradients_come_out_and_can_be_carried_later() -> None:
    slots, target, labels, chosen = inputs()
    slots.requires_grad_()
    decoder, task = make(), DecoderTask(2, 0.3, 0.7, labels, chosen)
    expected, _ = one_pass(decoder, slots, target, task)
    with torch.no_grad():
        carrier, decoded = decoder(slots, task, target)
    assert not carrier.requires_grad and len(decoded.gradients) == 1 + len(list(decoder.parameters()))
    carrier, _ = decoder(slots, decoded, target)
    for key, value in gradients_of(carrier, slots, decoder).items():
        assert torch.equal(value, expected[key]), key


class Largest(TorchDispatchMode):
    """The most entries of any tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                self.numel = max(self.numel, tensor.numel())
        return made


@pytest.mark.parametrize("recomputed", [False, True])
def test_nothing_as_large_as_slots_times_patches_times_width_is_made(recomputed: bool) -> None:
    rows, width, num_slots, frames, patches = 40, 32, 7, 6, 12
    decoder = make([width, width], rows=rows)
    slots, target, labels, chosen = inputs(1, frames, num_slots, patches)
    slots.requires_grad_()
    with Largest() as largest:
        if recomputed:
            reconstruction, logits = decoder(slots.flatten(0, 1))
            (reconstruction.square().sum() + logits.square().sum()).backward()
        else:
            decoder(slots, DecoderTask(1, 0.3, 0.7, labels, chosen), target)[0].backward()
    maps = frames * patches * max(num_slots, WIDTH)
    assert largest.numel <= max(rows * width, maps, frames * num_slots * width, width * width)
    assert largest.numel < frames * patches * num_slots * width / 4


def test_autograd_keeps_slots_and_weights_only() -> None:
    slots, decoder, kept = inputs()[0].flatten(0, 1).requires_grad_(), make(rows=20), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        reconstruction, logits = decoder(slots)
    allowed = {tensor.data_ptr() for tensor in (slots, *decoder.parameters())}
    assert {tensor.data_ptr() for tensor in kept} <= allowed


def test_more_slots_than_a_byte_counts() -> None:
    slots, target = torch.randn(1, 1, 130, DIM).double(), torch.randn(1, 1, 12, WIDTH).double()
    decoded = fused_decoder.learn(make()._weights(), slots, target, DecoderTask(1, 1.0), make()._settings(slots))
    assert decoded.object_labels.dtype == torch.int16
    expected = make()._whole(slots[0])[1].argmax(dim=1)
    assert torch.equal(decoded.object_labels[0].long(), expected)


class TestProducts:
    def test_onednn_agrees_with_torch(self) -> None:
        if not onednn_is_right():
            pytest.skip("this torch has no usable oneDNN operator")
        x, weight, bias, grad = torch.randn(200, 190), torch.randn(180, 190), torch.randn(180), torch.randn(200, 180)
        assert products._suits(x, 180)
        own, theirs = OneDnnProducts(), Products()
        for relu in (False, True):
            torch.testing.assert_close(
                own.linear(x, weight, bias, relu), theirs.linear(x, weight, bias, relu), rtol=1e-4, atol=1e-4
            )
        torch.testing.assert_close(own.through(grad, weight), theirs.through(grad, weight), rtol=1e-4, atol=1e-4)
        totals = torch.ones(180, 190), torch.ones(180, 190)
        own.add_outer(totals[0], grad, x)
        theirs.add_outer(totals[1], grad, x)
        torch.testing.assert_close(*totals, rtol=1e-4, atol=1e-4)

    def test_torch_is_used_where_the_operator_is_missing_or_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu = torch.device("cpu")
        for broken in (_missing, lambda *args, **more: torch.zeros(1)):
            monkeypatch.setattr(products, "_pointwise", broken)
            onednn_is_right.cache_clear()
            assert type(choose_products("onednn", cpu)) is Products
        monkeypatch.undo()
        onednn_is_right.cache_clear()
        assert type(choose_products("torch", cpu)) is Products
        assert type(choose_products("onednn", torch.device("meta"))) is Products


def _missing(*args: object, **more: object) -> Tensor:
    raise AttributeError("no such operator")
