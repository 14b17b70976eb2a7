"""Codecs: what they keep, what they refuse, what their error means."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from data_pipeline.codec import CODECS, ChannelStatistics, CodecError, find_codec, fit_statistics
from data_pipeline.errors import ConfigError, DataError


def values() -> np.ndarray:
    loud_and_quiet = np.array([100.0, 1.0, 0.01], np.float32)
    return np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32) * loud_and_quiet


def test_float32_keeps_every_bit_and_float16_rounds() -> None:
    original = values()
    exact, half = CODECS["float32"], CODECS["float16"]
    np.testing.assert_array_equal(exact.decode(exact.encode(original)), original)
    stored = half.encode(original)
    assert stored.dtype == np.float16 and half.frame_dtype(6, 3).itemsize == stored.nbytes // 4
    np.testing.assert_allclose(half.decode(stored), original, rtol=2**-11, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 65536.0, -70000.0])
def test_float16_refuses_what_it_cannot_hold(bad: float) -> None:
    broken = values()
    broken[2, 1, 0] = bad
    with pytest.raises(DataError, match="65504|not finite, first in frame 2"):
        CODECS["float16"].encode(broken)


def test_float32_refuses_only_what_is_not_finite() -> None:
    broken = values()
    broken[1, 0, 2] = 1e30
    assert CODECS["float32"].encode(broken)[1, 0, 2] == np.float32(1e30)
    broken[3, 0, 2] = np.inf
    with pytest.raises(DataError, match="frame 3"):
        CODECS["float32"].encode(broken)


def test_unknown_codec_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="codec='float61'.*float16"):
        find_codec("float61")


INT8 = CODECS["int8"]
MASSIVE = np.array([1.0, 0.02, 300.0, 5.0], np.float32)


def massive(tokens: int = 400, seed: int = 0) -> np.ndarray:
    """Channels of very different size, one with a mean far from 0. Shapes: float32 (4, tokens, 4)."""
    noise = np.random.default_rng(seed).normal(size=(4, tokens, 4)).astype(np.float32)
    return noise * MASSIVE + np.array([0, 3, 9000, -1], np.float32)


def test_int8_keeps_a_quiet_channel_beside_a_massive_one() -> None:
    values = massive()
    statistics = fit_statistics(values)
    restored = INT8.decode(INT8.encode(values, statistics), statistics)
    assert restored.dtype == np.float32
    relative = (restored - values).std(axis=(0, 1)) / values.std(axis=(0, 1))
    assert relative.max() < 0.01
    plain = np.abs(values).max(axis=-1, keepdims=True) / 127
    unaware = np.rint(values / plain) * plain
    assert (unaware - values).std(axis=(0, 1))[1] / values.std(axis=(0, 1))[1] > 0.5  # what a scale per token alone would cost


@settings(deadline=None, max_examples=60)
@given(
    values=st_numpy.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    seed=st.integers(0, 5),
)
def test_int8_is_never_off_by_more_than_half_a_step(values: np.ndarray, seed: int) -> None:
    width = values.shape[-1]
    random = np.random.default_rng(seed)
    scale = np.exp(random.normal(size=width) * 8).astype(np.float32)
    statistics = ChannelStatistics((random.normal(size=width) * scale).astype(np.float32), scale)
    reach = np.abs((values.astype(np.float64) - statistics.mean) / scale).max()
    if reach > 65504 * 126:
        if reach > 65504 * 128:
            with pytest.raises(DataError, match="deviations from its channel's mean; codec int8 holds at most"):
                INT8.encode(values, statistics)
        return
    stored = INT8.encode(values, statistics)
    assert stored.dtype == INT8.frame_dtype(*values.shape[1:]) and stored.dtype.itemsize % 2 == 0
    restored = INT8.decode(stored, statistics)
    step = stored["scale"].astype(np.float64)[..., None] * scale
    rounding = 1e-6 * (np.abs(values) + np.abs(statistics.mean) + step * 127)
    assert (np.abs(restored - values.astype(np.float64)) <= 0.5001 * step + rounding).all()


def test_int8_of_tokens_at_the_mean_is_exact() -> None:
    statistics = ChannelStatistics(np.array([3.0, -7.0], np.float32), np.array([1.0, 2.0], np.float32))
    values = np.broadcast_to(statistics.mean, (2, 3, 2))
    stored = INT8.encode(values, statistics)
    assert not stored["scale"].any() and not stored["q"].any()
    np.testing.assert_array_equal(INT8.decode(stored, statistics), values)


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 3e38])
def test_int8_refuses_what_it_cannot_hold(bad: float) -> None:
    values = massive(6)
    statistics = fit_statistics(values)
    values[2, 1, 0] = bad
    with pytest.raises(DataError, match="not finite, first in frame 2|codec int8 holds at most 1e38"):
        INT8.encode(values, statistics)


@pytest.mark.parametrize(("patches", "width"), [(6, 5), (3, 3), (1, 1)])
def test_int8_is_an_ordinary_npy_array_with_frames_in_front(patches: int, width: int) -> None:
    values = np.random.default_rng(0).normal(size=(4, patches, width)).astype(np.float32)
    stored = INT8.encode(values, fit_statistics(values))
    file = io.BytesIO()
    np.lib.format.write_array(file, stored, version=(1, 0), allow_pickle=False)
    assert len(file.getvalue()) % 64 == stored.nbytes % 64
    file.seek(0)
    again = np.load(file, allow_pickle=False)
    assert again.shape == (4,) and again.tobytes() == stored.tobytes()
    assert again["q"].shape == (4, patches, width) and again["scale"].dtype == np.float16


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("patches", "width"), [(6, 4), (3, 5)])
def test_a_batch_is_restored_to_the_same_bits(codec: str, patches: int, width: int) -> None:
    """From the bytes of two clips with statistics of their own, also through a slice of the batch."""
    clips, tables = [], []
    for seed in range(2):
        values = np.random.default_rng(seed).normal(3, 2, size=(3, patches, width)).astype(np.float32)
        statistics = fit_statistics(values)
        clips.append((CODECS[codec].encode(values, statistics), statistics))
        tables.append(np.stack([statistics.mean, statistics.scale]))
    dtype, shape = CODECS[codec].batch_layout(patches, width)
    bytes_of = np.stack([np.frombuffer(stored.tobytes(), dtype).reshape(3, *shape) for stored, _ in clips])
    table = torch.from_numpy(np.stack(tables))
    restored = CODECS[codec].restore(torch.from_numpy(bytes_of), patches, table)
    assert restored.dtype == torch.float32
    for row, (stored, statistics) in enumerate(clips):
        np.testing.assert_array_equal(restored[row].numpy(), CODECS[codec].decode(stored, statistics))
    part = CODECS[codec].restore(torch.from_numpy(bytes_of)[1:, 1:], patches, table[1:])
    assert torch.equal(part, restored[1:, 1:])


def test_statistics_do_not_depend_on_how_tokens_are_cut_and_survive_json() -> None:
    tokens = massive().reshape(-1, 4)
    whole, parts = fit_statistics([tokens]), fit_statistics(np.array_split(tokens, 7))
    for name in ("mean", "scale"):
        np.testing.assert_allclose(getattr(whole, name), getattr(parts, name), rtol=1e-6)
    np.testing.assert_allclose(whole.scale, tokens.astype(np.float64).std(axis=0), rtol=1e-6)
    again = ChannelStatistics.from_json(json.loads(json.dumps(whole.to_json())), 4)
    assert again.mean.tobytes() == whole.mean.tobytes() and again.scale.tobytes() == whole.scale.tobytes()


def test_dead_channels_neither_divide_by_zero_nor_take_up_the_range() -> None:
    values = massive()
    values[..., 0], values[..., 3] = 0, -7.25
    statistics = fit_statistics(values)
    assert (statistics.scale > 0).all()
    later = massive(seed=1)  # in which they live: a clip that the first pass had not seen
    restored = INT8.decode(INT8.encode(later, statistics), statistics)
    assert np.isfinite(restored).all()
    constant = fit_statistics([np.zeros((5, 3), np.float32)])
    np.testing.assert_array_equal(constant.scale, 1)


@pytest.mark.parametrize(
    ("parts", "message"), [([], "no features"), ([np.empty((0, 3))], "no features"), ([np.full((2, 3), np.nan)], "not finite")]
)
def test_statistics_of_nothing_are_refused(parts: list[np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_statistics(parts)


@pytest.mark.parametrize(
    "broken", [{}, {"mean": [0.0], "scale": [1.0]}, {"mean": [0, 0], "scale": [1, 0]}, {"mean": [0, 1e400], "scale": [1, 1]}]
)
def test_broken_statistics_are_refused(broken: dict) -> None:
    with pytest.raises(DataError, match="statistics: .*build the shards again"):
        ChannelStatistics.from_json(broken, 2)


def test_report_of_int8_on_ordinary_features() -> None:
    values = massive()
    statistics = fit_statistics(values)
    stored = INT8.encode(values, statistics)
    error = CodecError(4)
    error.add(values, INT8.decode(stored, statistics), stored.nbytes)
    report = CodecError.report([json.loads(json.dumps(error.to_json()))])
    assert 0.001 < report["err_std"] < 0.01 and 0 < report["cosine_loss"] < 1e-5 and report["constant_channels"] == 0
    assert report["bytes_vs_float16"] == pytest.approx((4 + 2) / 8) and report["nearest_neighbour"] > 0.5


def test_nearest_neighbours_are_those_of_the_next_frame() -> None:
    """Two frames with the same tokens in another order; swapping two of them afterwards moves just those two's neighbours."""
    random = np.random.default_rng(3)
    frame = random.normal(size=(12, 9)).astype(np.float32)
    values = np.stack([frame, frame[::-1]])
    swapped = values.copy()
    swapped[1, [2, 5]] = swapped[1, [5, 2]]
    for restored, expected in ((values, 1.0), (swapped, 10 / 12)):
        error = CodecError(9)
        error.add(values, restored)
        assert CodecError.report([error.to_json()])["nearest_neighbour"] == pytest.approx(expected)
    single = CodecError(9)
    single.add(values[:1], values[:1])
    assert CodecError.report([single.to_json()])["nearest_neighbour"] == 1


def test_rounding_noise_of_a_nearly_constant_channel_is_no_error() -> None:
    """A channel that stands at 1000 and shakes by a float32 unit; summed up naively its deviation would be anything."""
    values = massive()
    values[..., 3] = 1000 + 6e-5 * (np.arange(400) % 2)
    statistics = fit_statistics(values)
    error = CodecError(4)
    error.add(values, INT8.decode(INT8.encode(values, statistics), statistics))
    report = CodecError.report([error.to_json()])
    assert report["constant_channels"] == 1 and report["err_std"] < 0.01


def test_error_counts_each_channel_by_its_own_deviation() -> None:
    """An error of a tenth of each channel's deviation is 0.1, however loud the channel; parts add up to the whole."""
    original = values().astype(np.float64)
    restored = original + 0.1 * original.std(axis=(0, 1)) * np.where(np.arange(6) % 2, 1, -1)[None, :, None]
    whole = CodecError(3)
    whole.add(original, restored)
    parts = []
    for cut in (slice(0, 1), slice(1, 4)):
        part = CodecError(3)
        part.add(original[cut], restored[cut])
        parts.append(part.to_json())
    assert CodecError.merge([whole.to_json()]) == pytest.approx(0.1)
    assert CodecError.merge(parts) == pytest.approx(0.1)


def test_error_ignores_constant_channels_and_empty_shards() -> None:
    error = CodecError(2)
    constant = np.full((2, 3, 2), 7.0)
    error.add(constant, constant + 1)
    assert CodecError.merge([error.to_json()]) is None
    assert CodecError.merge([CodecError(2).to_json()]) is None
    assert CodecError.merge([]) is None
    assert CodecError.report([error.to_json()])["constant_channels"] == 2
