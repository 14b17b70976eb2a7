"""The run folder keeps what a run was made with, and no secret."""

from __future__ import annotations

import sys

import pytest

from data_pipeline.config import DataConfig
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
