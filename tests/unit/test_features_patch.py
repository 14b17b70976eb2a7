"""The weight-free descriptor: hand-made cases, the slow projection, saving, determinism."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from data_pipeline.config import FeaturesConfig, PatchFeatures
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.features import GROUP_SCHEMAS, FittedExtractor, build_extractor
from data_pipeline.features.patch import PatchExtractor, describe, soft_positions
from data_pipeline.features.slow import expand, fit_slow

SETTINGS = {"patch_size": 4, "num_components": 5, "num_random": 7, "position_scale": 1.0}


def clip(seed, frames=6, height=24, width=32):
    """A coloured square that moves over a smooth background, with pixel noise."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    back, front = draw.random(3), draw.random(3)
    out = np.zeros((frames, 3, height, width))
    for t in range(frames):
        top, left = draw.integers(0, 3) + t, 2 * t + seed % 4
        inside = (y >= top) & (y < top + 12) & (x >= left) & (x < left + 12)
        out[t] = back[:, None, None] * (0.7 + 0.3 * x / width)
        out[t][:, inside] = front[:, None] * (0.6 + 0.4 * ((y + x) % 6 < 3)[inside])
    return torch.from_numpy(np.clip(out + 0.03 * draw.standard_normal(out.shape), 0, 1)).float()


def fitted(clips=5, **settings):
    extractor = PatchExtractor(PatchFeatures(**(SETTINGS | settings)))
    extractor.fit(clip(seed) for seed in range(clips))
    return extractor


def neighbour_correlation(features):
    """Correlation of each channel, inside clips, between a patch and those right, below and in the next frame."""
    values = (features - features.mean((1, 2, 3), keepdim=True)).permute(1, 2, 3, 0, 4)  # T Y X clips C
    pairs = [(values[:, :, 1:], values[:, :, :-1]), (values[:, 1:], values[:, :-1]), (values[1:], values[:-1])]
    both = sum((a * b).sum((0, 1, 2, 3)) for a, b in pairs)
    size = sum((a.square() + b.square()).sum((0, 1, 2, 3)) for a, b in pairs) / 2
    return both / size


def test_what_goes_in_and_out():
    extractor = fitted()
    assert isinstance(extractor, FittedExtractor) and extractor.needs_fit
    for frames, height, width in ((3, 8, 20), (1, 16, 12), (4, 24, 32)):
        features = extractor(clip(9, frames, height, width))
        assert features.shape == (frames, height * width // 16, 5 + 6) and features.dtype == torch.float32
        assert torch.isfinite(features).all()
    assert extractor.width == 11


def test_patches_run_row_by_row():
    extractor = fitted()
    positions = extractor(clip(3, 2, 8, 12))[0, :, 5:]
    torch.testing.assert_close(positions, soft_positions(2, 3).reshape(6, 6))
    assert positions[0, 0] == positions[2, 0] and positions[0, 0] < positions[3, 0]  # y
    assert positions[0, 1] == positions[3, 1] and positions[0, 1] < positions[1, 1]  # x
    assert torch.equal(fitted(position_scale=0.5)(clip(3, 2, 8, 12))[0, :, 5:], positions / 2)


def test_description_of_a_flat_frame():
    frames = torch.full((2, 3, 8, 12), 0.5)
    frames[:, 0] = 1.0
    frames[:, 2] = 0.25
    values = describe(frames, 4)
    assert values.shape == (2, 2, 3, 78)
    own, context = values[..., :39], values[..., 39:]
    torch.testing.assert_close(own, context)
    torch.testing.assert_close(own[0, 0, 0, :6], torch.tensor([1.0, 0.5, 0.25, 0, 0, 0]))
    histogram = torch.zeros(3, 3, 3)
    histogram[2, 1, 0] = histogram[2, 1, 1] = 0.5**0.5  # blue 1/4 lies half-way between the bins at 0 and 1/2
    torch.testing.assert_close(own[0, 0, 0, 6:33], histogram.flatten())
    assert not own[..., 33:].any()


def test_histogram_weights_sum_to_one_and_edges_have_their_orientation():
    values = describe(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 4)
    torch.testing.assert_close(values[..., 6:33].square().sum(-1), torch.ones(2, 2, 2))
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    across = describe(ramp, 4)[0, 1, 1, 33:38]
    down = describe(ramp.transpose(2, 3), 4)[0, 1, 1, 33:38]
    step = 2 / 15
    torch.testing.assert_close(across, step * torch.tensor([1, 1, 0.5**0.5, 0, 0.5**0.5]))
    torch.testing.assert_close(down, step * torch.tensor([1, 0, 0.5**0.5, 1, 0.5**0.5]))


def test_motion_is_the_change_since_the_frame_before():
    frames = torch.zeros(3, 3, 8, 8)
    frames[1, :, :4, :4] = 0.3
    frames[2] = frames[1]
    change = describe(frames, 4)[..., 38]
    expected = torch.zeros(3, 2, 2)
    expected[0, 0, 0] = expected[1, 0, 0] = 0.3
    torch.testing.assert_close(change, expected)
    assert not describe(frames[1:2], 4)[..., 38].any()


def test_context_is_the_mean_over_three_by_three_patches():
    values = describe(clip(1), 4)
    own, context = values[..., :39], values[..., 39:]
    torch.testing.assert_close(context[2, 3, 4], own[2, 2:5, 3:6].mean((0, 1)))


def test_a_fit_is_reproducible_and_depends_on_seed_and_clips():
    first, again = fitted(), fitted()
    assert first.fingerprint == again.fingerprint
    assert torch.equal(first(clip(9)), again(clip(9)))
    others = [fitted(seed=1), fitted(clips=4), fitted(position_scale=3.0)]
    assert len({item.fingerprint for item in [first, *others]}) == 4


def test_kept_directions_are_slower_than_random_ones_and_fall():
    extractor = fitted(clips=8)
    described = torch.stack([describe(clip(seed), 4) for seed in range(8)])
    projection = extractor._projection
    kept = neighbour_correlation(projection(described))
    names = (projection.mean, projection.deviation, projection.random_weight, projection.random_bias)
    directions = torch.randn(78 + 7, 5, generator=torch.Generator().manual_seed(2))
    random = neighbour_correlation(expand(described, *names) @ directions)
    assert kept.min() > random.max()
    assert projection.correlation[0] <= 1.0 and (projection.correlation.diff() <= 0).all() and projection.correlation[-1] > 0


def test_the_solution_is_that_of_the_generalised_eigenproblem():
    """Pairs listed one by one; no random features, so everything is linear in the descriptors."""
    draw = torch.Generator().manual_seed(4)
    smooth = torch.randn(3, 3, 4, 2, generator=draw).cumsum(1).cumsum(2)
    clips = [torch.cat([smooth, torch.randn(3, 3, 4, 4, generator=draw)], -1), torch.randn(2, 2, 3, 6, generator=draw)]
    projection = fit_slow(clips, num_components=3, num_random=0, seed=0)
    pairs, clip_of_pair = [], []
    for number, item in enumerate(clips):
        values = ((item - projection.mean) / projection.deviation).double().numpy()
        frames, rows, columns, _ = values.shape
        for t, y, x in np.ndindex(frames, rows, columns):
            for dt, dy, dx in ((0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 1, -1), (1, 0, 0)):
                if t + dt < frames and y + dy < rows and 0 <= x + dx < columns:
                    pairs.append((values[t, y, x], values[t + dt, y + dy, x + dx]))
                    clip_of_pair.append(number)
    a, b = (np.stack(side) for side in zip(*pairs, strict=True))
    mean = np.concatenate([a, b]).mean(0)
    for number in range(len(clips)):
        here = np.array(clip_of_pair) == number
        clip_mean = np.concatenate([a[here], b[here]]).mean(0)
        a[here], b[here] = a[here] - clip_mean, b[here] - clip_mean
    covariance, neighbour = (a.T @ a + b.T @ b) / (2 * len(a)), (a.T @ b + b.T @ a) / (2 * len(a))
    ridge = 1e-3 * np.trace(covariance) / 6 * np.eye(6)
    eigenvalues = np.sort(np.linalg.eigvals(np.linalg.solve(covariance + ridge, neighbour)).real)
    np.testing.assert_allclose(projection.correlation, eigenvalues[::-1][:3], rtol=1e-4)
    # Inside clips outputs are centred, uncorrelated, and have their correlation as deviation.
    weight = projection.weight.double().numpy()
    expected = np.diag(projection.correlation.double().numpy() ** 2)
    np.testing.assert_allclose(weight.T @ covariance @ weight, expected, atol=3e-3)
    np.testing.assert_allclose(mean @ weight + projection.bias.numpy(), 0, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_clips_that_show_nothing_cannot_be_fitted(value):
    with pytest.raises(DataError, match="all alike"):
        PatchExtractor(PatchFeatures(**SETTINGS)).fit([torch.full((4, 3, 32, 32), value)])


def test_save_and_load_are_the_identity(tmp_path):
    extractor = fitted()
    extractor.save(tmp_path / "a.safetensors")
    fitted().save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    other = build_extractor(PatchFeatures(**SETTINGS))
    assert isinstance(other, PatchExtractor)
    other.load(tmp_path / "a.safetensors")
    assert other.fingerprint == extractor.fingerprint
    assert torch.equal(other(clip(9)), extractor(clip(9)))


def test_before_the_fit_nothing_works(tmp_path):
    extractor = PatchExtractor(PatchFeatures(**SETTINGS))
    for use in (lambda: extractor(clip(0)), lambda: extractor.save(tmp_path / "x"), lambda: extractor.fingerprint):
        with pytest.raises(DataError, match="no projection yet"):
            use()
    assert not (tmp_path / "x").exists()


def test_damaged_and_foreign_projections_are_refused(tmp_path):
    path = tmp_path / "projection.safetensors"
    fitted().save(path)
    content = path.read_bytes()
    extractor = PatchExtractor(PatchFeatures(**SETTINGS))
    flipped = bytearray(content)
    flipped[-3] ^= 0x10
    for damage, words in ((content[:100], "damaged"), (content[:-8], "damaged"), (bytes(flipped), "damaged"), (b"{}", "damaged")):
        path.write_bytes(damage)
        with pytest.raises(DataError, match=words):
            extractor.load(path)
        with pytest.raises(DataError, match="no projection yet"):
            extractor(clip(0))
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"'num_components': 5.*asked for.*'num_components': 4"):
        PatchExtractor(PatchFeatures(**(SETTINGS | {"num_components": 4}))).load(path)
    with pytest.raises(DataError, match="does not exist"):
        extractor.load(tmp_path / "none.safetensors")


def test_bad_settings_and_clips():
    with pytest.raises(ConfigError, match=r"num_components=99.*85"):
        fitted(num_components=99)
    with pytest.raises(DataError, match="0 clips"):
        fitted(clips=0)
    with pytest.raises(DataError, match="no two neighbouring patches"):
        PatchExtractor(PatchFeatures(**SETTINGS)).fit([clip(0, 1, 4, 4)])
    with pytest.raises(ConfigError, match=r"features.patch_size=1"):
        PatchExtractor(PatchFeatures(patch_size=1))
    with pytest.raises(ConfigError, match="10x32 pixels"):
        fitted()(clip(0, 2, 10, 32))


def test_large_clips_are_fitted_on_their_middle():
    extractor = PatchExtractor(PatchFeatures(**SETTINGS))
    long = clip(0, frames=30, height=64, width=64)  # 256 patches a frame: 16 frames are looked at, from the 7th on
    assert torch.equal(extractor._middle(long), describe(long[7:23], 4))


def test_the_table_is_light_and_complete():
    script = "import sys, data_pipeline.features as f; assert 'torch' not in sys.modules; print(sorted(f.EXTRACTORS))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "'dinov2_vitl14'" in result.stdout and "'patch'" in result.stdout
    assert GROUP_SCHEMAS["features/patch_schema"] is PatchFeatures


def test_every_member_of_the_configuration_group_composes():
    from data_pipeline.compose import CONFIG_DIR, compose
    from data_pipeline.config import BuildConfig
    from data_pipeline.features import EXTRACTORS
    from data_pipeline.sources import GROUP_SCHEMAS as SOURCES_SCHEMAS

    members = sorted(path.stem for path in (CONFIG_DIR / "features").glob("*.yaml"))
    assert members == sorted(EXTRACTORS)
    for member in members:
        overrides = [f"features={member}", "source=synthetic", "out=nowhere"]
        config = compose("build_shards", BuildConfig, overrides, GROUP_SCHEMAS | SOURCES_SCHEMAS)
        assert config.features.name == member
        assert type(config.features) is (PatchFeatures if member == "patch" else FeaturesConfig)
