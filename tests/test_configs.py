"""Every file under configs/ composes; a wrong key or value is refused in one line with the nearest valid name."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster import site_flags
from cluster.config import parse
from data_pipeline.compose import CONFIG_DIR, compose, keys_of
from data_pipeline.config import BuildConfig, MoviSource, PatchFeatures
from data_pipeline.errors import ConfigError
from data_pipeline.features import GROUP_SCHEMAS as FEATURE_SCHEMAS
from data_pipeline.sources import GROUP_SCHEMAS as SOURCE_SCHEMAS
from trainer.config import EvaluationConfig, RunConfig

TRAIN_GROUPS = ("data", "model", "objective", "optim", "parallel", "observe", "experiment")
BUILD_GROUPS = ("source", "features")
SITES = sorted((CONFIG_DIR / "cluster").glob("*.yaml"))  # flags of the launcher, not Hydra's
SCHEMAS = {**SOURCE_SCHEMAS, **FEATURE_SCHEMAS}


def members(*groups: str) -> list[tuple[str, str]]:
    return [(group, path.stem) for group in groups for path in sorted((CONFIG_DIR / group).glob("*.yaml"))]


def build(*overrides: str) -> BuildConfig:
    return compose("build_shards", BuildConfig, ["out=x", *overrides], SCHEMAS)


def test_every_file_belongs_to_a_group_that_is_tested():
    known = {(CONFIG_DIR / group / f"{name}.yaml") for group, name in members(*TRAIN_GROUPS, *BUILD_GROUPS)}
    roots = {CONFIG_DIR / f"{name}.yaml" for name in ("train", "build_shards", "evaluate", "export")}
    assert {path for path in CONFIG_DIR.rglob("*.y*ml")} == known | roots | set(SITES)
    assert not [path for path in CONFIG_DIR.rglob("*.py") if path.name != "__init__.py"]


@pytest.mark.parametrize(("group", "name"), members(*TRAIN_GROUPS))
def test_a_training_member_composes(group, name):
    config = compose("train", RunConfig, [f"{group}={name}"])
    assert isinstance(config, RunConfig)


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.stem)
def test_a_site_gives_defaults_of_flags(path):
    assert parse(["--cluster", path.stem, "--nodes", "2"]).backend == site_flags.read(path.stem)["backend"]


@pytest.mark.parametrize(("group", "name"), members(*BUILD_GROUPS))
def test_a_build_member_composes(group, name):
    assert isinstance(build(f"{group}={name}"), BuildConfig)


def test_a_member_brings_its_own_schema():
    config = build("source=movi", "features=patch", "source.variant=movi_e", "features.num_components=12")
    assert isinstance(config.source, MoviSource) and config.source.variant == "movi_e"
    assert isinstance(config.features, PatchFeatures) and config.features.num_components == 12


PUBLISHED = {  # experiment: slots, slot width, features, image, lr, batch, steps, boundary weight, merge threshold
    "slotcontrast_movi_c": (11, 64, "dinov2_vits14", 336, 4e-4, 64, 100_000, 0.0, None),
    "slotcontrast_movi_e": (15, 128, "dinov2_vitb14", 336, 4e-4, 64, 300_000, 0.0, None),
    "slotcontrast_ytvis2021": (7, 64, "dinov2_vitb14", 518, 8e-4, 64, 100_000, 0.0, None),
    "slotcontrast_coco2017": (7, 64, "dinov2_vits14", 224, 8e-4, 128, 100_000, 0.0, None),
    "ssync_movi_c": (11, 64, "dinov2_vits14", 336, 8e-4, 128, 100_000, 1.0, 0.70),
    "ssync_movi_e": (15, 128, "dinov2_vitb14", 336, 8e-4, 128, 300_000, 1.0, 0.65),
    "ssync_ytvis2021": (7, 64, "dinov2_vitb14", 518, 8e-4, 128, 100_000, 1.0, 0.60),
    "ssync_coco2017": (7, 64, "dinov2_vits14", 224, 8e-4, 128, 100_000, 1.0, 0.90),
}


@pytest.mark.parametrize("name", [name for group, name in members("experiment") if name != "demo"])
def test_published_scores_are_those_of_the_files_header(name):
    header = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text().partition("Published: ")[2].partition("\n")[0]
    published = compose("train", RunConfig, [f"experiment={name}"]).published
    found = re.findall(r"(FG-ARI|mBO) (\d+\.\d)(?: \+- (\d+\.\d))?", header)
    level = "frame" if "coco" in name else "video"
    for part, place in ((published.percent, 1), (published.plus_minus, 2)):
        wanted = {f"{level}_{'mbo' if pair[0] == 'mBO' else 'fg_ari'}": float(pair[place]) for pair in found if pair[place]}
        assert {key: value for key, value in asdict(part).items() if value is not None} == wanted
    assert len(found) == 2 and published.source


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["published.percent.video_ari_fg=3"], "video_fg_ari"),
        (["published.percent.video_mbo=390"], "published video_mbo=390"),
    ],
)
def test_a_published_score_that_cannot_be_one_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        compose("train", RunConfig, words)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    config = compose("train", RunConfig, [f"experiment={name}"])
    slots, dim, features, image, lr, batch, steps, weight, threshold = PUBLISHED[name]
    assert (config.model.num_slots, config.model.slot_dim) == (slots, dim)
    assert (config.data.features, config.data.image_size) == (features, image)
    assert (config.optim.lr, config.optim.global_batch, config.optim.max_steps) == (lr, batch, steps)
    assert (config.optim.warmup_steps, config.optim.decay_steps, config.optim.clip_norm) == (2500, steps, 0.05)
    ssync = config.objective.ssync
    assert (ssync.boundary_weight, ssync.interior_weight, ssync.start_fraction) == (weight, weight, 0.3)
    assert threshold is None or ssync.merge.threshold == threshold
    assert [side * 14 for side in config.model.grid] == [image, image]
    assert (config.model.iters_first, config.model.iters_next) == (3, 2)
    assert config.name == name


def test_the_paper_preset_flips_what_the_paper_prints():
    config = compose("train", RunConfig, ["objective=ssync_paper"]).objective
    assert config.slot_contrast.axis == "paper_earlier_anchor"
    assert (config.ssync.boundary_strict, config.ssync.class_reduction, config.ssync.merge.space) == (True, "sum", "probs")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "not a setting", "optim.lr"]),
        ("nonsense=1", ["nonsense", "not a setting"]),
        ("optim.lr=fast", ["optim.lr", "fast"]),
        ("optim.max_steps=1.5", ["optim.max_steps", "1.5"]),
        ("optim.max_steps=0", ["optim.max_steps=0", "at least 1"]),
        ("experiment=ssync_movi", ["ssync_movi", "ssync_movi_c", "does not exist"]),
        ("model=slots_65", ["slots_65", "slots_64"]),
        ("objective.ssync.border=wrap", ["objective.ssync.border", "wrap", "clamp"]),
        ("parallel.zero_stage=4", ["parallel.zero_stage=4", "0, 1, 2 or 3"]),
        ("model.slot_dim=66", ["model.slot_dim=66", "predictor_heads"]),
        ("data.views=[]", ["data.views"]),
        ("name=a/b", ["name=", "folder name"]),
        ("optim.lr", ["optim.lr"]),
        ("optim.lr=inf", ["optim.lr=inf", "finite"]),
        ("optim.betas=[2,3]", ["optim.betas", "[0, 1)"]),
        ("+foo=3", ["+foo=3", "schema"]),
        ("~optim", ["~optim", "schema"]),
        ("hydra.run.dir=x", ["hydra.run.dir", "schema"]),
        ("data.root=", ["data.root", "empty"]),
        ("runs=", ["runs", "empty"]),
        ("data.max_skip_fraction=2", ["data.max_skip_fraction=2", "share"]),
        ("evaluate.mask_size=0", ["evaluate.mask_size=0", "at least 1"]),
        ("objective.feature_reconstruction.weight=nan", ["nan", "finite"]),
    ],
)
def test_a_wrong_setting_is_one_line(override, words):
    with pytest.raises(ConfigError) as error:
        compose("train", RunConfig, [override])
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("out=", ["out", "empty"]),
        ("splits=[]", ["splits", "at least one"]),
        ("splits=[train,train]", ["splits", "each once"]),
        ("source.train_views=[]", ["source.train_views"]),
        ("limit=-1", ["limit=-1"]),
        ("jpeg_quality=500", ["jpeg_quality=500"]),
        ("workers=-1", ["workers=-1"]),
        ("features.batch_frames=0", ["features.batch_frames=0"]),
        ("+source.nosuch=4", ["+source.nosuch=4"]),
    ],
)
def test_a_wrong_build_setting_is_one_line(override, words):
    with pytest.raises(ConfigError) as error:
        build(override)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_a_missing_setting_is_named():
    with pytest.raises(ConfigError, match="run is not set"):
        compose("evaluate", EvaluationConfig, [])


def test_keys_of_lists_groups_and_leaves():
    keys = keys_of(RunConfig)
    assert "objective.ssync.merge.threshold" in keys and "optim.lr" in keys and "optim" in keys
    assert len(keys) == len(set(keys))


def test_config_yaml_round_trips(tmp_path: Path):
    from omegaconf import OmegaConf

    from trainer.run_folder import read_config

    config = compose("train", RunConfig, ["experiment=ssync_movi_e", "seed=7"])
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    assert asdict(read_config(tmp_path)) == asdict(config)
