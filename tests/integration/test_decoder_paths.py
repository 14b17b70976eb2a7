"""Updates with the fused decoder against updates with its plain twin, over everything that changes what the decoder learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import ClipBatch
from trainer.config import MergeConfig, ModelConfig, ObjectiveConfig, OptimConfig, ParallelConfig, SSyncConfig
from trainer.engine import Engine
from trainer.model.network import VideoSlotModel
from trainer.objective import Objective
from trainer.passes import DecoderInOnePass, WholeMaps, choose_passes
from trainer.step import NonFiniteLoss, StepReport, train_step

CPU = torch.device("cpu")
MODEL = ModelConfig(
    num_slots=4, slot_dim=8, feature_dim=10, grid=[3, 4], predictor_heads=2, decoder_hidden=[12, 14], query_key_gain=3.0
)
SSYNC = SSyncConfig(boundary_weight=1.0, interior_weight=0.7, start_fraction=0.2, merge=MergeConfig(threshold=0.8))
CLIPS, STEPS = 4, 3


pytestmark = pytest.mark.usefixtures("one_rank")


def batch_of(step: int, num_real: int = CLIPS, frames: int = 3) -> ClipBatch:
    draw = torch.Generator().manual_seed(100 + step)
    features = torch.randn(CLIPS, frames, 12, 10, generator=draw)
    features[num_real:] = features[:1]
    names = tuple(f"clip{number}" for number in range(CLIPS))
    return ClipBatch(
        features=features, grid=(3, 4), num_real=num_real, sample_ids=tuple(range(CLIPS)), keys=names, starts=(0,) * CLIPS
    )


def train(
    ssync: SSyncConfig = SSYNC, accumulation: int = 1, precision: str = "fp32", real: int = CLIPS, **model: Any
) -> tuple[list[StepReport], dict[str, Tensor], Engine]:
    """Three updates; SSync joins at the second."""
    torch.manual_seed(5)
    network = VideoSlotModel(replace(MODEL, **model))
    objective = Objective(ObjectiveConfig(ssync=ssync), max_steps=5)
    optim = OptimConfig(lr=1e-2, max_steps=10, warmup_steps=1, decay_steps=10, eps=1e-4)
    engine = Engine(network, optim, ParallelConfig(accumulation=accumulation, precision=precision, device="cpu"), CPU)
    reports = [train_step(engine, objective, batch_of(step, real), [real], step, lr=1e-2) for step in range(STEPS)]
    return reports, engine.weights(), engine


def assert_same(one: tuple[list[StepReport], dict[str, Tensor], Engine], other: Any, tolerance: float = 2e-6) -> None:
    for first, second in zip(one[0], other[0], strict=True):
        assert first.terms.keys() == second.terms.keys()
        for name, value in first.terms.items():
            assert second.terms[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
        assert first.total == pytest.approx(second.total, rel=tolerance)
    for name, value in one[1].items():
        torch.testing.assert_close(other[1][name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    "ssync",
    [
        SSYNC,
        replace(SSYNC, boundary_weight=0.0),
        replace(SSYNC, interior_weight=0.0),
        replace(SSYNC, boundary_weight=0.0, interior_weight=0.0),
        replace(SSYNC, class_reduction="sum", temperature=0.5),
        replace(SSYNC, min_different=11),
        replace(SSYNC, merge=MergeConfig(source="D", threshold=0.5)),
    ],
    ids=["all terms", "no boundary", "no interior", "no SSync", "sums at another temperature", "no patch chosen", "merged by D"],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fused_updates_equal_plain_ones(ssync: SSyncConfig, accumulation: int) -> None:
    plain = train(ssync, decoder_path="plain")
    fused = train(ssync, accumulation, decoder_path="fused", decoder_chunk_rows=20)
    assert_same(plain, fused)
    if ssync.min_different > 10:
        assert plain[0][-1].terms["ssync_boundary"] == fused[0][-1].terms["ssync_boundary"] == 0


def test_padding_counts_nothing() -> None:
    assert_same(train(real=3, decoder_path="plain"), train(real=3, accumulation=4))
    changed = max(float((a - b).abs().max()) for a, b in zip(train(real=3)[1].values(), train()[1].values(), strict=True))
    assert changed > 1e-4


def test_recomputed_frames_change_nothing() -> None:
    for path in ("plain", "fused"):
        assert_same(train(decoder_path=path), train(decoder_path=path, recompute_frames=2))


def test_bf16_updates_stay_near() -> None:
    exact, narrow = train(), train(precision="bf16")
    for name, value in exact[0][-1].terms.items():
        assert narrow[0][-1].terms[name] == pytest.approx(value, rel=0.1), name


def test_features_stored_in_half_precision_are_read_in_float32() -> None:
    """Bit for bit what their float32 copies give, on both paths and with micro-batches."""
    for path in ("plain", "fused"):
        found = []
        for dtype in (torch.float16, torch.float32):
            torch.manual_seed(5)
            engine = Engine(
                VideoSlotModel(replace(MODEL, decoder_path=path)),
                OptimConfig(eps=1e-4),
                ParallelConfig(accumulation=2, device="cpu"),
                CPU,
            )
            batch = replace(batch_of(0), features=batch_of(0).features.half().to(dtype))
            found.append(train_step(engine, Objective(ObjectiveConfig(ssync=SSYNC), 5), batch, [CLIPS], step=4, lr=1e-2).terms)
        assert found[0] == found[1]


def test_an_empty_set_that_shall_be_nan_is_refused_before_the_update() -> None:
    ssync = replace(SSYNC, min_different=11, empty="nan")
    for path in ("plain", "fused"):
        with pytest.raises(NonFiniteLoss, match="ssync_boundary=nan"):
            train(ssync, decoder_path=path)


def test_the_objective_decides_between_the_passes() -> None:
    _, _, engine = train()
    parts = list(batch_of(0).split(1))
    by_attention, by_decoder = (
        Objective(ObjectiveConfig(ssync=replace(SSYNC, merge=MergeConfig(source=source))), max_steps=5) for source in "AD"
    )
    kinds = [type(choose_passes(engine, objective, parts, CLIPS, 4)) for objective in (by_attention, by_decoder)]
    assert kinds == [DecoderInOnePass, WholeMaps]
    assert type(choose_passes(engine, by_decoder, parts, CLIPS, 0)) is DecoderInOnePass, "before SSync joins nothing waits for D"
    engine.module.decoder.path = "plain"
    assert type(choose_passes(engine, by_attention, parts, CLIPS, 4)) is WholeMaps


def test_evaluation_reads_the_same_maps_on_both_paths() -> None:
    outputs = []
    for path in ("plain", "fused"):
        torch.manual_seed(0)
        network = VideoSlotModel(replace(MODEL, decoder_path=path, decoder_chunk_rows=30))
        outputs.append(network.segment(batch_of(0).features, 2))
    for name in ("slots", "attn_logits", "object_logits", "reconstruction"):
        torch.testing.assert_close(getattr(outputs[0], name), getattr(outputs[1], name))
        assert not getattr(outputs[1], name).requires_grad
