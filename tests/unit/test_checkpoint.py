"""Checkpoints: whole or not there, hashed, falling back past damage, the same tensors back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from benchmarks.measure import peak_resident_bytes
from data_pipeline.errors import ConfigError, StateError
from data_pipeline.order import Position
from trainer import checkpoint
from trainer.checkpoint_write import publish
from trainer.config import ModelConfig, OptimConfig, ParallelConfig
from trainer.engine import Engine
from trainer.model.network import VideoSlotModel
from trainer.snapshot import HostTensors, Snapshot
from trainer.state import TrainState

CONFIG = ModelConfig(num_slots=3, slot_dim=8, feature_dim=6, grid=[2, 3], predictor_heads=2, decoder_hidden=[10, 9])
CPU = torch.device("cpu")


def state(step: int) -> TrainState:
    return TrainState(step=step, position=Position(dataset_version="abc", seed=1, global_batch=4, position=4 * step))


def make_engine(adam=None, weights=None) -> Engine:
    model = VideoSlotModel(CONFIG)
    if weights is not None:
        model.load_state_dict(dict(weights))
    return Engine(model, OptimConfig(lr=1e-2), ParallelConfig(zero_stage=1), CPU, adam=adam, example=torch.zeros(1, 2, 6, 6))


def update(engine: Engine, seed: int) -> None:
    output = engine.forward(torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(seed)))
    engine.backward((output.reconstruction - output.target).square().mean())
    engine.step(1e-2)


@pytest.fixture(scope="module")
def engine(one_rank):
    torch.manual_seed(0)
    made = make_engine()
    update(made, 1)
    return made


@pytest.fixture
def root(engine, tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path / "checkpoints", engine, state(step))
    return tmp_path / "checkpoints"


def steps(root) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.candidates(root)]


def test_a_resumed_engine_goes_on_bit_for_bit(engine, root):
    found = checkpoint.load_newest(root, print)
    assert found.state == state(30)
    twin = make_engine(adam=found.adam, weights=found.weights)
    for name, value in engine.weights().items():
        assert torch.equal(value, twin.weights()[name]), name
    # the engine has done one update, whatever the checkpoint calls its step; Adam's bias correction must go on from there
    for moments in twin._adam.state.values():
        moments["step"].fill_(1)
    before = engine.adam_state(1)
    update(engine, 2)
    update(twin, 2)
    for name, value in engine.weights().items():
        assert torch.equal(value, twin.weights()[name]), name
    assert not torch.equal(before.exp_avg["initializer.slots"], engine.adam_state(2).exp_avg["initializer.slots"])


def test_retention_keeps_the_newest(engine, root):
    saved = checkpoint.save(root, engine, state(40))
    assert steps(root) == [40, 30, 20, 10]
    checkpoint.retire(root, keep=2, trusted=saved.path, report=print)
    assert steps(root) == [40, 30]


def test_retention_counts_only_what_verifies(engine, root):
    damaged = root / "step_00000030" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    said: list[str] = []
    saved = checkpoint.save(root, engine, state(40))
    checkpoint.retire(root, keep=2, trusted=saved.path, report=said.append)
    assert steps(root) == [40, 30, 20]
    assert "step_00000030" in said[0] and "bytes" in said[0]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_found(root, data):
    folder = root / "step_00000030"
    name = data.draw(st.sampled_from(["model.safetensors", "optimizer.safetensors", "state.json"]))
    content = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    original = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes(content))
    try:
        assert name in checkpoint.problem(folder)
    finally:
        (folder / name).write_bytes(original)
    assert checkpoint.problem(folder) == ""


@pytest.mark.parametrize("damage", ["cut", "empty", "no_manifest", "bad_manifest", "missing"])
def test_a_damaged_newest_is_passed_over_and_reported(root, damage):
    folder = root / "step_00000030"
    if damage == "cut":
        (folder / "optimizer.safetensors").write_bytes((folder / "optimizer.safetensors").read_bytes()[:100])
    elif damage == "empty":
        (folder / "model.safetensors").write_bytes(b"")
    elif damage == "no_manifest":
        (folder / "manifest.json").unlink()
    elif damage == "bad_manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "state.json").unlink()
    said: list[str] = []
    found = checkpoint.load_newest(root, said.append)
    assert found.state.step == 20
    assert len(said) == 1 and "step_00000030" in said[0]


def test_nothing_that_verifies_is_an_error_and_nothing_is_touched(root):
    for path in checkpoint.candidates(root):
        (path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(StateError, match="none of 3 checkpoints"):
        checkpoint.load_newest(root, lambda text: None)
    assert steps(root) == [30, 20, 10]


def test_no_candidate_is_a_first_start(engine, tmp_path):
    assert checkpoint.load_newest(tmp_path / "nothing", print) is None


def test_a_damaged_folder_of_the_same_step_is_set_aside_not_overwritten(engine, root):
    folder = root / "step_00000030"
    (folder / "model.safetensors").write_bytes(b"damaged")
    checkpoint.save(root, engine, state(30))
    assert checkpoint.problem(folder) == ""
    assert (root / "step_00000030.set_aside_1" / "model.safetensors").read_bytes() == b"damaged"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "model.safetensors"), OSError(5, "Input/output error")])
def test_a_failed_write_leaves_the_older_ones_and_no_rest(engine, root, monkeypatch, error):
    def refuse(*args):
        raise error

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StateError, match=f"step 40 could not be written: {error.strerror}"):
        checkpoint.save(root, engine, state(40))
    assert steps(root) == [30, 20, 10]
    assert not list(root.glob(".writing*"))


def test_rests_of_a_killed_save_are_cleared(engine, root):
    (root / ".writing_step_00000040_99").mkdir()
    checkpoint.save(root, engine, state(50))
    assert not list(root.glob(".writing*"))


def test_another_shape_is_one_line_that_names_the_tensor(root):
    found = checkpoint.read(root / "step_00000030")
    other = VideoSlotModel(
        ModelConfig(num_slots=5, slot_dim=8, feature_dim=6, grid=[2, 3], predictor_heads=2, decoder_hidden=[10, 9])
    )
    with pytest.raises(ConfigError) as error:
        checkpoint.load_weights(other, found)
    assert "initializer.slots is [3, 8]" in str(error.value) or "initializer.slots is [1, 3, 8]" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_manifest_names_every_file(root):
    manifest = json.loads((root / "step_00000030" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert {path.name for path in (root / "step_00000030").iterdir()} == {*manifest["files"], "manifest.json"}


def test_weights_that_are_not_finite_are_not_saved(engine, root):
    slots = engine.module.initializer.slots
    before = slots.detach().clone()
    try:
        slots.data[0, 0] = float("nan")
        with pytest.raises(StateError, match="weights are not finite .initializer.slots"):
            checkpoint.save(root, engine, state(40))
    finally:
        slots.data.copy_(before)
    assert steps(root) == [30, 20, 10]
    assert not list(root.glob(".writing*"))


def test_the_files_are_plain_safetensors_that_hold_what_the_engine_holds(engine, root):
    stored = load_file(root / "step_00000030" / "model.safetensors")
    whole = engine.weights()
    assert stored.keys() == whole.keys() and all(torch.equal(stored[name], whole[name]) for name in whole)
    moments, adam = load_file(root / "step_00000030" / "optimizer.safetensors"), engine.adam_state(1)
    for key in ("exp_avg", "exp_avg_sq"):
        for name, value in getattr(adam, key).items():
            assert torch.equal(moments.pop(f"{key}/{name}"), value), name
    assert not moments


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda manifest: manifest["files"].pop("model.safetensors"), "manifest.json cannot be read"),
        (lambda manifest: manifest.update(files={}), "manifest.json cannot be read"),
        (lambda manifest: manifest.update(step=20), "that of step 20"),
        (lambda manifest: manifest.update(format="other/1"), "format 'other/1'"),
        (lambda manifest: manifest["files"]["state.json"].pop("sha256"), "state.json has another sha256"),
    ],
)
def test_a_manifest_that_promises_less_does_not_verify(root, edit, words):
    path = root / "step_00000030" / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    assert words in checkpoint.problem(path.parent)
    assert checkpoint.load_newest(root, lambda text: None).state.step == 20


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 8 + b"{}",
        (100).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        to_bytes({"a": torch.zeros(3, dtype=torch.float64)}),
        to_bytes({"a": torch.zeros(3)}) + bytes(4),
        HostTensors({"a": (3,)}).header[:-1] + b"\t" + bytes(12),
        b"",
    ],
)
def test_a_file_that_is_not_ours_is_refused_though_its_hash_is_right(root, content):
    path = root / "step_00000030"
    (path / "model.safetensors").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StateError, match="cannot be read|ended while"):
        checkpoint.read(path)
    assert checkpoint.load_newest(root, lambda text: None).state.step == 20


def test_reading_takes_the_memory_of_what_is_read(tmp_path):
    path, numbers = tmp_path / "step_00000007", 4_000_000
    weights = HostTensors({"a": (numbers // 4, 3), "b": (numbers // 4,)})
    moments = HostTensors({f"{key}/a": (numbers,) for key in ("exp_avg", "exp_avg_sq")})
    for held in (weights, moments):
        held.memory.copy_(torch.arange(held.memory.numel()))
    publish(tmp_path, Snapshot(weights, moments), state(7))
    found: list[checkpoint.Checkpoint] = []
    grown, reset = peak_resident_bytes(lambda: found.append(checkpoint.read(path)))
    assert torch.equal(found[0].weights["b"], weights.tensors["b"])
    assert torch.equal(found[0].adam.exp_avg_sq["a"], moments.tensors["exp_avg_sq/a"])
    if not reset:
        pytest.skip("the kernel does not let a process reset its highest memory")
    assert grown < 1.25 * 12 * numbers


def test_the_content_of_another_step_does_not_verify(root):
    for file in (root / "step_00000020").iterdir():
        shutil.copyfile(file, root / "step_00000030" / file.name)
    assert "step 20" in checkpoint.problem(root / "step_00000030")


def test_a_retired_checkpoint_vanishes_at_once(engine, root, monkeypatch):
    """One that is half removed when the process is killed must not look like a damaged one."""
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    checkpoint.retire(root, keep=1, trusted=root / "step_00000030", report=print)
    assert steps(root) == [30]
    monkeypatch.undo()
    checkpoint.save(root, engine, state(40))
    assert sorted(path.name for path in root.iterdir()) == ["newest.json", "step_00000030", "step_00000040"]
