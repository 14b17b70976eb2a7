"""Codecs: what they keep, what they refuse, what their error means."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.codec import CODECS, CodecError, find_codec
from data_pipeline.errors import ConfigError, DataError


def values() -> np.ndarray:
    loud_and_quiet = np.array([100.0, 1.0, 0.01], np.float32)
    return np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32) * loud_and_quiet


def test_float32_keeps_every_bit_and_float16_rounds() -> None:
    original = values()
    exact, half = CODECS["float32"], CODECS["float16"]
    np.testing.assert_array_equal(exact.decode(exact.encode(original)), original)
    stored = half.encode(original)
    assert stored.dtype == half.stored == half.decoded == np.float16
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
