"""Export: one file that plain torch loads, under our names or the official ones."""

from __future__ import annotations

import json
import os

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from data_pipeline.config import DataConfig
from data_pipeline.errors import ConfigError
from data_pipeline.order import Position
from trainer import checkpoint, export
from trainer.config import CheckpointConfig, ExportConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig
from trainer.engine import Engine
from trainer.model.network import VideoSlotModel
from trainer.model.official_names import from_official, to_official
from trainer.state import TrainState

MODEL = ModelConfig(num_slots=3, slot_dim=8, feature_dim=6, grid=[2, 3], predictor_heads=2, decoder_hidden=[10, 9])


@pytest.fixture(scope="module")
def run(one_rank, tmp_path_factory):
    """A run folder with a checkpoint of step 5, as training leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = RunConfig(name="tiny", data=DataConfig(root="nowhere", features="fake"), model=MODEL, checkpoint=CheckpointConfig())
    torch.manual_seed(0)
    engine = Engine(VideoSlotModel(MODEL), OptimConfig(), ParallelConfig(), torch.device("cpu"))
    output = engine.forward(torch.randn(1, 2, 6, 6))
    engine.backward(output.reconstruction.square().mean())
    engine.step(1e-3)
    position = Position(dataset_version="abc", seed=1, global_batch=4, position=20)
    checkpoint.save(folder / "checkpoints", engine, TrainState(5, position, "f" * 64))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return folder, engine.weights(), config


def built_from(path) -> VideoSlotModel:
    """The model that the help text says how to load."""
    described = json.loads(path.with_suffix(".json").read_text())
    model = VideoSlotModel(ModelConfig(**described["model"]))
    model.load_state_dict(load_file(path))
    return model


def test_one_file_and_its_configuration_make_the_model(run, tmp_path):
    folder, weights, _ = run
    out = export.export_run(ExportConfig(run=str(folder), out=str(tmp_path / "made" / "tiny.safetensors")))
    for name, value in built_from(out).state_dict().items():
        assert torch.equal(value, weights[name]), name
    described = json.loads(out.with_suffix(".json").read_text())
    assert (described["step"], described["run"], described["features_fingerprint"]) == (5, "tiny", "f" * 64)


def test_official_names_and_shapes_lead_back(run):
    folder, weights, _ = run
    out = export.export_run(ExportConfig(run=str(folder), format="official"))
    assert out == folder / "model_official.safetensors"
    official = load_file(out)
    assert official["initializer.slots"].shape == (1, 3, 8) and official["decoder.module.pos_emb"].shape == (1, 1, 6, 8)
    assert official["processor.module.corrector.gru.weight_ih"].shape == (24, 8)
    back = from_official(official, weights)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_a_tensor_that_official_models_lack_is_named():
    with pytest.raises(ValueError, match="tensor extra.weight is not part"):
        to_official({"extra.weight": torch.zeros(1)})


def test_a_finished_run_has_its_last_weights_under_one_name(run):
    folder, weights, config = run
    said: list[str] = []
    newest = folder / "checkpoints" / "step_00000005"
    export.keep_last(folder, newest, config, said.append)
    assert os.path.samefile(folder / "model.safetensors", newest / "model.safetensors"), "no second copy of the bytes"
    assert all(torch.equal(value, weights[name]) for name, value in built_from(folder / "model.safetensors").state_dict().items())
    export.keep_last(folder, folder / "nothing", config, said.append)
    assert len(said) == 1 and "was not written" in said[0] and "trainer.export" in said[0]
    assert (folder / "model.safetensors").is_file()


def test_files_without_links_are_copied(run, monkeypatch):
    folder, _, config = run

    def no_links(*args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    export.keep_last(folder, folder / "checkpoints" / "step_00000005", config, print)
    assert built_from(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"out": "weights.bin"}, "ends in .safetensors"),
        ({"step": 4}, "choose one of 5"),
        ({"run": "/nowhere"}, "config.yaml"),
    ],
)
def test_a_mistake_is_one_line(run, settings, words):
    with pytest.raises(ConfigError, match=words) as error:
        export.export_run(ExportConfig(**{"run": str(run[0]), **settings}))
    assert "\n" not in str(error.value)
