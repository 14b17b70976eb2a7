"""Ranks of a build: who they are, how they share the work and end together; the bytes do not tell how many there were."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_build import FakeExtractor, FakeSource, config_for, contents, fake_extractor, fake_source

from data_pipeline import build as build_module
from data_pipeline.build import build
from data_pipeline.build_ranks import OwnStore, Place, Stopped, Team, join
from data_pipeline.errors import ConfigError, DataError, StateError
from data_pipeline.shards import DatasetIndex

source = pytest.fixture(fake_source, name="source")
extractor = pytest.fixture(fake_extractor, name="extractor")
LAUNCHED = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "77"}


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.build_ranks.LAST_WORD_S", 0.0)
    monkeypatch.setattr("data_pipeline.build.NETWORK_FILES_S", 2.0)


def build_in_ranks(monkeypatch: pytest.MonkeyPatch, world_size: int, make: Callable[[int], Any]) -> list[BaseException | None]:
    """Every rank a thread, all with one store; returns what each raised."""
    store = OwnStore()
    monkeypatch.setattr(build_module, "join", lambda place: Team(place, store))
    ends: list[BaseException | None] = [None] * world_size

    def run(rank: int) -> None:
        try:
            build(make(rank), Place(rank=rank, world_size=world_size))
        except BaseException as error:
            ends[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return ends


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_give_the_bytes_of_one_process(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    extractor.needs_fit = True
    build(config_for(tmp_path / "one", samples_per_shard=2))
    extractor.gain, extractor.fits = 1.0, 0
    ends = build_in_ranks(monkeypatch, world_size, lambda rank: config_for(tmp_path / "all", samples_per_shard=2))
    assert ends == [None] * world_size and extractor.fits == 1
    assert contents(tmp_path / "all") == contents(tmp_path / "one")


def test_ranks_go_on_where_one_process_stopped(
    tmp_path: Path,
    source: FakeSource,
    extractor: FakeExtractor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build(config_for(tmp_path))
    whole = contents(tmp_path)
    (tmp_path / "train" / "train-000001.tar").write_bytes(b"cut")
    (tmp_path / "validation" / "validation-000000.json").unlink()
    capsys.readouterr()
    assert build_in_ranks(monkeypatch, 3, lambda rank: config_for(tmp_path)) == [None] * 3
    assert contents(tmp_path) == whole
    assert "2 finished shards verified and kept" in capsys.readouterr().out


def test_unreadable_videos_are_counted_over_all_ranks(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.broken = {"train_1", "train_6"}  # in two shards
    ends = build_in_ranks(monkeypatch, 2, lambda rank: config_for(tmp_path / "few", max_skip_fraction=2 / 7))
    assert ends == [None, None] and len(DatasetIndex.load(tmp_path / "few" / "train").skipped) == 2
    ends = build_in_ranks(monkeypatch, 2, lambda rank: config_for(tmp_path / "many", max_skip_fraction=1 / 7))
    assert sorted(type(end).__name__ for end in ends) in (["DataError", "StateError"], ["DataError", "DataError"])
    assert any("2 of 7 videos are unreadable" in str(end) for end in ends)
    assert not list((tmp_path / "many").rglob("index.json")) and not list((tmp_path / "many").rglob(".*.tmp"))


def test_a_rank_with_other_settings_ends_all(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = build_in_ranks(monkeypatch, 2, lambda rank: config_for(tmp_path, jpeg_quality=90 + rank))
    assert isinstance(ends[1], DataError) and "jpeg_quality=91 on this rank, 90 on rank 0" in str(ends[1])
    assert isinstance(ends[0], StateError) and "another rank has failed" in str(ends[0])


def test_one_that_is_stopped_stops_all(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(config_for(tmp_path / "whole"))
    count = build_module._count_finished

    def stop(*arguments: Any) -> None:
        count(*arguments)
        raise Stopped

    monkeypatch.setattr(build_module, "_count_finished", stop)
    ends = build_in_ranks(monkeypatch, 3, lambda rank: config_for(tmp_path / "out"))
    assert {type(end) for end in ends} == {Stopped}
    monkeypatch.setattr(build_module, "_count_finished", count)
    assert build_in_ranks(monkeypatch, 1, lambda rank: config_for(tmp_path / "out")) == [None]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_place_is_the_launchers() -> None:
    assert Place.from_environment({}) == Place.from_environment({"WORLD_SIZE": "1", "RANK": "0"}) == Place()
    place = Place.from_environment(LAUNCHED)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (2, 4, 0, 2)
    assert (place.address, place.port) == ("h", 77)


@pytest.mark.parametrize("change", [{"RANK": None}, {"MASTER_ADDR": None}, {"MASTER_PORT": "x"}, {"WORLD_SIZE": "many"}])
def test_half_a_launcher_is_refused(change: dict[str, str | None]) -> None:
    variables = {key: value for key, value in (LAUNCHED | change).items() if value is not None}
    with pytest.raises(ConfigError, match=r"cluster/launch.py build-shards, or unset WORLD_SIZE"):
        Place.from_environment(variables)


def test_a_lost_rank_0_is_one_line() -> None:
    class Lost(OwnStore):
        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("Connection was likely closed.\nframe #0")

    team = Team(Place(rank=3, world_size=4, address="node0", port=5), Lost())
    with pytest.raises(StateError, match=r"rank 3: lost rank 0 at node0:5 .*remote peer exited") as caught:
        team.check()
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError), team.ending_together():  # the first reason stays the reason
        raise ValueError


def test_who_waits_says_for_what(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("data_pipeline.build_ranks.REMINDER_S", 0.0)
    store = OwnStore()
    waits = iter([False, False, True])
    Team(Place(rank=1, world_size=2), store).wait_until(lambda: next(waits), "rank 0: settings")
    assert "rank 1 waits for rank 0: settings" in capsys.readouterr().err


def test_ranks_meet_over_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = [Place(rank=rank, world_size=2, address="127.0.0.1", port=port) for rank in range(2)]
    leader = join(places[0])
    other = join(places[1])
    leader.tell("settings", {"a": [1, "b"]})
    assert other.hear("settings") == {"a": [1, "b"]}
    assert (other.add("claimed", 1), leader.add("claimed", 1), other.add("claimed", 0)) == (1, 2, 2)
    leader.check()
    with pytest.raises(ValueError), other.ending_together():
        raise ValueError
    with pytest.raises(StateError, match="another rank has failed"):
        leader.check()


def test_no_rank_0_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.build_ranks.CONNECT_PATIENCE_S", 0.5)
    with pytest.raises(StateError, match=r"rank 1: no rank 0 at 127.0.0.1:9 within 0.5 s") as caught:
        join(Place(rank=1, world_size=2, address="127.0.0.1", port=9))
    assert "\n" not in str(caught.value)
