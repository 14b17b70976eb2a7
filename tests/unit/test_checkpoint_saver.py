"""The saver: training goes on while a checkpoint is written, and it counts only once it lies on the disk."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import StateError, StorageError
from data_pipeline.order import Position
from trainer import checkpoint, checkpoint_saver, checkpoint_write
from trainer.checkpoint_saver import Saver, owner_fence
from trainer.config import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig
from trainer.engine import Engine
from trainer.model.network import VideoSlotModel
from trainer.probe import Probe
from trainer.state import TrainState

CONFIG = ModelConfig(num_slots=3, slot_dim=8, feature_dim=6, grid=[2, 3], predictor_heads=2, decoder_hidden=[10, 9])


class Notes:
    """What the observer would be told."""

    def __init__(self) -> None:
        self.saved_steps: list[int] = []
        self.failures: list[tuple[int, str, int]] = []
        self.damaged: list[str] = []

    def saved(self, step: int, num_bytes: int, seconds: float, stall_s: float) -> None:
        self.saved_steps.append(step)

    def save_failed(self, step: int, why: str, in_a_row: int) -> None:
        self.failures.append((step, why, in_a_row))

    def verify_failed(self, text: str) -> None:
        self.damaged.append(text)


def state(step: int) -> TrainState:
    return TrainState(step=step, position=Position(dataset_version="abc", seed=1, global_batch=4, position=4 * step))


def update(engine: Engine, seed: int) -> None:
    output = engine.forward(torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(seed)))
    engine.backward((output.reconstruction - output.target).square().mean())
    engine.step(1e-2)


@pytest.fixture(scope="module")
def engine(one_rank):
    torch.manual_seed(0)
    made = Engine(VideoSlotModel(CONFIG), OptimConfig(lr=1e-2), ParallelConfig(zero_stage=1), torch.device("cpu"))
    update(made, 1)
    return made


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
def saver(engine, tmp_path, notes):
    made = Saver(tmp_path / "checkpoints", CheckpointConfig(keep=2), engine, notes, probe=Probe(CONFIG, 0))
    yield made
    made.close()


@pytest.fixture
def gate(monkeypatch):
    """Holds every write back until it is set; entered tells that one has begun."""
    opened, real = threading.Event(), checkpoint_write.write_tensors
    opened.entered = threading.Event()

    def write_tensors(*args):
        opened.entered.set()
        assert opened.wait(60)
        return real(*args)

    monkeypatch.setattr(checkpoint_write, "write_tensors", write_tensors)
    yield opened
    opened.set()


def steps(root: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.candidates(root)]


def wait_for_news(saver: Saver) -> None:
    saver._future.result(60)


def test_training_goes_on_while_it_is_written_and_it_counts_when_it_lies_there(engine, saver, notes, gate):
    before = engine.weights()
    saver.save(state(1))
    update(engine, 2)  # the weights move on under the write
    saver.stepped(2, saver.has_news())
    assert (saver.saved_step, notes.saved_steps, steps(saver.root)) == (-1, [], [])
    gate.set()
    wait_for_news(saver)
    assert saver.has_news()
    saver.stepped(3, saver.has_news())
    assert (saver.saved_step, saver.good_step, notes.saved_steps) == (1, 1, [1])
    stored = checkpoint.read(saver.root / "step_00000001").weights
    assert all(torch.equal(stored[name], before[name]) for name in before)


def test_the_next_save_waits_for_the_one_in_flight(saver, notes, gate):
    saver.save(state(1))
    assert gate.entered.wait(60)
    threading.Timer(0.2, gate.set).start()
    saver.save(state(2))
    assert notes.saved_steps == [1] and saver.saved_step == 1
    saver.save(state(2), final=True)
    assert notes.saved_steps == [1, 2] and steps(saver.root) == [2, 1]


def test_who_waits_hears_that_a_save_goes_on_and_nothing_when_it_is_stuck(saver, gate, monkeypatch):
    monkeypatch.setattr(checkpoint_saver, "LOOK_EVERY_S", 0.02)
    saver.save(state(1))
    assert gate.entered.wait(60) and saver.in_flight == 1
    assert [saver._awaited() for _ in range(3)] == [None] * 3
    monkeypatch.setattr(checkpoint_saver, "STALLED_S", 0.0)
    threading.Timer(0.5, gate.set).start()
    assert saver._awaited().saved is not None  # it did not come back before the end
    assert saver.in_flight is None


def test_what_looks_stale_is_left_to_a_new_owner(engine, tmp_path, notes):
    root = tmp_path / "checkpoints"
    for name in (".writing_step_00000009_1", ".removing_step_00000001"):
        (root / name).mkdir(parents=True)

    def fence():
        raise StateError("the folder is attempt 2's")

    saver = Saver(root, CheckpointConfig(keep=1), engine, notes, fence=fence)
    with pytest.raises(StateError, match="attempt 2"):
        saver.save(state(1), final=True)
    saver.close()
    assert len(list(root.glob(".*_step_*"))) == 2 and steps(root) == []


def test_host_memory_is_taken_once(saver):
    saver.save(state(1), final=True)
    places = [memory.memory.data_ptr() for memory in (saver._snapshots._weights, saver._snapshots._moments)]
    saver.save(state(2), final=True)
    assert places == [memory.memory.data_ptr() for memory in (saver._snapshots._weights, saver._snapshots._moments)]


def test_older_ones_stay_until_the_new_one_lies_there_and_has_given_a_finite_loss(saver, notes, gate):
    gate.set()
    for step in (1, 2):
        saver.save(state(step), final=True)
        saver.stepped(step + 1, False)
    gate.clear()
    saver.save(state(3))
    saver.stepped(4, saver.has_news())
    assert steps(saver.root) == [2, 1]
    gate.set()
    saver.save(state(3), final=True)
    assert steps(saver.root) == [3, 2, 1] and saver.good_step == 2
    saver.finish()
    assert steps(saver.root) == [3, 2] and saver.good_step == 3


def test_retention_in_the_background_tells_of_damage_and_keeps_one_more(saver, notes):
    for step in (1, 2):
        saver.save(state(step), final=True)
        saver.stepped(step + 1, False)
    (saver.root / "step_00000002" / "model.safetensors").write_bytes(b"")
    saver.save(state(3), final=True)
    saver.finish()
    assert steps(saver.root) == [3, 2, 1]
    assert len(notes.damaged) == 1 and "step_00000002" in notes.damaged[0]


def test_without_asynchronous_a_save_returns_when_it_is_done(engine, tmp_path, notes):
    saver = Saver(tmp_path / "checkpoints", CheckpointConfig(asynchronous=False, keep=1), engine, notes)
    for step in (1, 2):
        saver.save(state(step))
        assert notes.saved_steps[-1] == step
        saver.stepped(step + 1, saver.has_news())
        assert steps(saver.root) == [step]
    saver.close()


def refuse_writes(monkeypatch, error: Exception) -> None:
    def refuse(*args):
        raise error

    monkeypatch.setattr(checkpoint_write, "write_tensors", refuse)


def test_a_disk_that_refuses_is_counted_until_it_may_not_refuse_again(saver, notes, monkeypatch):
    saver.save(state(1), final=True)
    refuse_writes(monkeypatch, OSError(5, "Input/output error"))
    for step in (2, 3):
        saver.save(state(step))
        wait_for_news(saver)
        saver.stepped(step + 1, True)
    assert [(step, number) for step, _, number in notes.failures] == [(2, 1), (3, 2)]
    saver.save(state(4))
    wait_for_news(saver)
    with pytest.raises(StorageError, match="step 4 could not be written: Input/output error.*3 saves in a row"):
        saver.stepped(5, True)
    assert steps(saver.root) == [1] and saver.saved_step == 1
    assert not list(saver.root.glob(".writing*"))


def test_a_save_that_works_again_starts_the_count_anew(saver, notes, monkeypatch):
    refuse_writes(monkeypatch, OSError(28, "No space left on device"))
    saver.save(state(1))
    wait_for_news(saver)
    saver.stepped(2, True)
    monkeypatch.undo()
    saver.save(state(2), final=True)
    assert (notes.saved_steps, saver._failures) == ([2], 0)


def test_a_stop_request_tries_once_more_and_then_says_that_it_cannot(saver, notes, monkeypatch):
    refuse_writes(monkeypatch, OSError(30, "Read-only file system"))
    saver.save(state(1))
    with pytest.raises(StateError, match="Read-only file system"):
        saver.save(state(1), final=True)


@pytest.mark.parametrize("error", [ValueError("a bug"), StateError("not this one")])
def test_what_no_disk_says_ends_the_run_at_once(saver, monkeypatch, error):
    refuse_writes(monkeypatch, error)
    saver.save(state(1))
    wait_for_news(saver)
    with pytest.raises(StateError, match=str(error)):
        saver.stepped(2, saver.has_news())


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "64k"):
    """A file system of its own that is soon full; None where this process may not mount one."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, check=False)
    try:
        yield folder if mount.returncode == 0 else None
    finally:
        if mount.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def short_files(limit: int):
    """No file of this process may grow past `limit` bytes: another disk that has no more room, for which no rights are needed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_that_may_not_grow(engine, saver, notes):
    saver.save(state(1), final=True)
    with short_files(10_000):
        saver.save(state(2))
        wait_for_news(saver)
        saver.stepped(3, True)
    assert steps(saver.root) == [1] and "File too large" in notes.failures[0][1]
    assert not list(saver.root.glob(".writing*")) and not checkpoint.problem(saver.root / "step_00000001")
    saver.save(state(3), final=True)
    assert steps(saver.root) == [3, 1]


def assert_only_the_first_is_there(saver: Saver) -> None:
    assert steps(saver.root) == [1] and not checkpoint.problem(saver.root / "step_00000001")
    assert not list(saver.root.glob(".writing*"))


def test_a_full_disk_is_seen_before_a_byte_is_written(engine, tmp_path, notes, gate):
    """Where no small disk can be mounted, a demand that no disk meets stands in for it."""
    gate.set()
    with small_disk(tmp_path / "disk", "1200k") as disk, pytest.MonkeyPatch.context() as patch:
        saver = Saver((disk or tmp_path) / "checkpoints", CheckpointConfig(), engine, notes)
        saver.save(state(1), final=True)
        gate.entered.clear()
        if disk is None:
            patch.setattr(checkpoint_write, "SMALL_FILES", 1 << 60)
        else:
            (disk / "others").write_bytes(bytes(200_000))
        saver.save(state(2))
        wait_for_news(saver)
        saver.stepped(3, True)
        assert "MiB are free" in notes.failures[0][1] and not gate.entered.is_set()
        assert_only_the_first_is_there(saver)
        saver.close()


def test_a_disk_that_fills_up_during_the_write(engine, tmp_path, notes, monkeypatch):
    """Where no small disk can be mounted, a limit on the size of files stands in for it."""
    monkeypatch.setattr(checkpoint_write, "SMALL_FILES", -(1 << 40))  # nobody looks beforehand
    with small_disk(tmp_path / "disk", "60k") as disk, contextlib.ExitStack() as stack:
        saver = Saver((disk or tmp_path) / "checkpoints", CheckpointConfig(), engine, notes)
        saver.save(state(1), final=True)
        if disk is None:
            stack.enter_context(short_files(10_000))
        saver.save(state(2))
        wait_for_news(saver)
        saver.stepped(3, True)
        assert "No space left" in notes.failures[0][1] or disk is None
        assert_only_the_first_is_there(saver)
        saver.close()


def test_a_disk_that_is_read_only(engine, tmp_path, notes):
    """Where no disk can be mounted, a file in the way of the folder stands in for it."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        root = (disk or tmp_path) / "checkpoints"
        saver = Saver(root, CheckpointConfig(), engine, notes)
        if disk is None:
            root.write_text("in the way")
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        saver.save(state(1))
        wait_for_news(saver)
        saver.stepped(2, True)
        assert len(notes.failures) == 1 and ("Read-only" in notes.failures[0][1] or disk is None)
        saver.close()


def owner(folder: Path, attempt: object) -> None:
    (folder / "owner.json").write_text(json.dumps({"attempt": attempt, "pid": 4711, "host": "node9"}))


def test_an_attempt_that_was_replaced_publishes_nothing(engine, tmp_path, notes):
    saver = Saver(tmp_path / "checkpoints", CheckpointConfig(), engine, notes, fence=owner_fence(tmp_path, 3))
    owner(tmp_path, 3)
    saver.save(state(1), final=True)
    owner(tmp_path, 4)
    with pytest.raises(StateError, match="attempt 4.*process 4711 on node9.*attempt 3; nothing was published"):
        saver.save(state(2), final=True)
    assert_only_the_first_is_there(saver)
    saver.close()


@pytest.mark.parametrize("content", [None, "", "[]", '{"attempt": "x"}', '{"attempt": 2}'])
def test_a_fence_without_a_newer_owner_is_open(tmp_path, content):
    if content is not None:
        (tmp_path / "owner.json").write_text(content)
    owner_fence(tmp_path, 2)()


def test_the_probe_finds_weights_that_verify_and_are_others(saver, tmp_path):
    """A tensor under another's name, hashed faithfully: only what the model makes of it tells."""
    saver.save(state(1), final=True)
    weights = saver._snapshots._weights.tensors
    slot_norm = [name for name in weights if name.endswith("norm_slots.weight")][0]
    saver.stepped(2, False)
    saver._probe = lambda tensors: Probe(CONFIG, 0)({**tensors, slot_norm: tensors[slot_norm] * 1.001})
    saver.save(state(2), final=True)
    said: list[str] = []
    assert checkpoint.load_newest(saver.root, said.append).state.step == 2
    assert checkpoint.load_newest(saver.root, said.append, Probe(CONFIG, 0)).state.step == 1
    assert len(said) == 1 and "step_00000002" in said[0] and "probe loss" in said[0]


def test_the_probe_is_the_same_everywhere_and_costs_no_random_number(engine):
    weights, before = engine.weights(), torch.get_rng_state()
    found = Probe(CONFIG, 7)(weights)
    assert found == Probe(replace(CONFIG, decoder_path="plain"), 7)(weights)
    assert found != Probe(CONFIG, 8)(weights)
    assert torch.equal(before, torch.get_rng_state())
    for name in weights:
        changed = {**weights, name: weights[name] * 1.01 + 1e-4}
        assert Probe(CONFIG, 7)(changed) != found, name


def test_a_checkpoint_without_a_probe_is_as_good(saver):
    saver._probe = None
    saver.save(state(1), final=True)
    assert checkpoint.load_newest(saver.root, print, Probe(CONFIG, 0)).state.step == 1
