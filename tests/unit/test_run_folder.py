"""The run folder keeps what a run was made with, and no secret."""

from __future__ import annotations

import sys

import pytest

from data_pipeline.config import DataConfig, MixturePart
from data_pipeline.errors import ConfigError
from trainer.config import RunConfig
from trainer.run_folder import prepare, read_config

SECRET = "s3cret"


@pytest.mark.parametrize("root", [f"https://me:{SECRET}@host/shards", f"https://host/shards?sig={SECRET}&x={SECRET}"])
def test_no_file_of_a_run_holds_the_secret_of_a_url(tmp_path, monkeypatch, root):
    monkeypatch.setattr(sys, "argv", ["main.py", f"data.root={root}", "data.clip_len=3"])
    prepare(tmp_path, RunConfig(data=DataConfig(root=root, features="patch", clip_len=3)), attempt=1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert all(SECRET not in path.read_text() for path in files)
    found = read_config(tmp_path).data
    assert (found.root, found.clip_len) == ("https://host/shards", 3)


def mixed(root: str, *parts: tuple[str, int]) -> RunConfig:
    mixture = [MixturePart(root=f"https://{login}/shards", weight=weight) for login, weight in parts]
    return RunConfig(data=DataConfig(root=root, features="patch", mixture=mixture))


def test_a_run_goes_on_wherever_the_datasets_of_its_mixture_lie(tmp_path):
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    begun = mixed("a", (f"me:{SECRET}@host", 1), ("other", 2))
    for attempt, config in enumerate([begun, begun, mixed("b", ("moved", 1), (f"you:{SECRET}@host", 2))]):
        prepare(tmp_path, config, attempt)
    assert [part.root for part in read_config(tmp_path).data.mixture] == ["https://moved/shards", "https://host/shards"]


@pytest.mark.parametrize("parts", [[("host", 1), ("other", 3)], [("host", 1)], [("host", 1), ("other", 2), ("more", 1)]])
def test_another_mixture_is_refused(tmp_path, parts):
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    prepare(tmp_path, mixed("a", ("host", 1), ("other", 2)), 1)
    with pytest.raises(ConfigError, match=r"^data.mixture=\[.*\], but run .* was begun with \[.*'weight': 2.*; choose another"):
        prepare(tmp_path, mixed("a", *parts), 2)


def test_a_refusal_holds_no_secret(tmp_path):
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    prepare(tmp_path, RunConfig(data=DataConfig(root="a", features="patch")), 1)
    with pytest.raises(ConfigError, match="data.train_split=https://host/x, but run .* was begun with train") as caught:
        prepare(tmp_path, RunConfig(data=DataConfig(root="a", features="patch", train_split=f"https://host/x?sig={SECRET}")), 2)
    assert SECRET not in str(caught.value)
