"""Shards behind a web server that misbehaves: the bytes are right or there is an error, and the cache folder stays clean."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import RemoteConfig
from data_pipeline.errors import ConfigError, DataError, FetchError
from data_pipeline.inspect import main as inspect
from data_pipeline.loader import ClipLoader
from data_pipeline.order import World
from data_pipeline.remote import fetch_http
from data_pipeline.remote.remote_files import CachedFiles
from data_pipeline.shards import DatasetIndex
from data_pipeline.store import ShardDataset, find_splits
from data_pipeline.verify import main as verify
from tests.integration.faulty_server import FaultyServer, changed, cut, dripping, flipped, page, status
from tests.unit.tiny_shards import data_config, flip_byte, write_split

FIRST, SECOND = "train-000000.tar", "train-000001.tar"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("served"), frames=((4, 6), (8,), (5,), (4,)))


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with FaultyServer(folder.parent) as server:
        yield server


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.remote.patience.FIRST_WAIT_S", 0.002)


def remote(tmp_path: Path, **changes: object) -> RemoteConfig:
    return RemoteConfig(**{"cache_dir": str(tmp_path / "cache"), "stall_s": 5.0, "attempts": 4, **changes})  # type: ignore[arg-type]


def same(dataset: ShardDataset, folder: Path) -> bool:
    local = ShardDataset.open(folder)
    return len(dataset) == len(local) and all(
        np.array_equal(dataset.features(sample, "center", 1, 3), local.features(sample, "center", 1, 3))
        and np.array_equal(dataset.frames(sample, 0, 2), local.frames(sample, 0, 2))
        for sample in range(len(local))
    )


def check_clean(tmp_path: Path, folder: Path, *shards: int) -> None:
    """The cache holds these shards, whole, and nothing else but the lock that stays."""
    index = DatasetIndex.load(folder)
    held = {path.name: path.read_bytes() for path in (tmp_path / "cache" / "shards").iterdir()}
    held.pop("room.lock")
    assert held == {
        f"{index.shards[shard]['sha256']}.tar": (folder / index.shards[shard]["name"]).read_bytes() for shard in shards
    }


BETTER = {
    "sound": [],
    "503 twice": [status(503), status(503, Retry_After="0")],
    "429 with a date": [status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT", Date="Wed, 21 Oct 2015 07:28:00 GMT")],
    "S3's way to say later": [status(400, b"<Error><Code>RequestTimeout</Code></Error>")],
    "cut inside a member": [cut(3000), cut(1)],
    "cut, length unknown": [cut(3000, with_length=False)],
    "cut between members, length unknown": [cut(5 * 512, with_length=False), cut(4 * 512, with_length=False)],
    "cut before the first byte": [cut(0), cut(0, with_length=False)],
    "flipped byte": [flipped(700)],
    "flipped, then cut, then busy": [flipped(20_000), cut(9000), status(502)],
}


@pytest.mark.parametrize("case", BETTER)
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_faults_that_pass(server: FaultyServer, folder: Path, tmp_path: Path, case: str, ranges: bool) -> None:
    server.faults, server.ranges = {FIRST: list(BETTER[case])}, ranges
    dataset = ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path))
    assert same(dataset, folder) and server.faults[FIRST] == []
    counters = dataset.files.counters
    assert counters.corrupt == case.count("flipped")
    assert counters.retries == len(BETTER[case]) - counters.corrupt
    assert counters.cache_misses == 4
    dataset.close()
    check_clean(tmp_path, folder, 0, 1, 2, 3)


@pytest.mark.parametrize("case", BETTER)
def test_faults_that_pass_when_only_ranges_are_read(server: FaultyServer, folder: Path, tmp_path: Path, case: str) -> None:
    if "flipped" in case:
        server.faults = {FIRST: [flipped(5)]}
    else:
        server.faults = {FIRST: list(BETTER[case])}
    dataset = ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path, mode="ranges"))
    assert same(dataset, folder)
    assert dataset.files.counters.fetched_bytes < sum(shard["bytes"] for shard in dataset.index.shards) / 2
    assert dataset.files.counters.corrupt == ("flipped" in case)
    dataset.close()
    assert not (tmp_path / "cache").exists()


FOR_GOOD = {
    "404": (status(404), "status 404; the object must exist"),
    "403 of S3": (status(403, b"<Error><Code>AccessDenied</Code></Error>"), "status 403 AccessDenied; .*credentials"),
    "401": (status(401), "status 401; .*netrc"),
    "clock": (status(403, b"<Error><Code>RequestTimeTooSkewed</Code></Error>"), "set this machine's clock"),
    "503": (status(503), "status 503; 4 attempts in .* brought nothing; .*data.remote.attempts"),
    "wait for an hour": (status(503, Retry_After="3600"), "the server asks for 1 h 0 min more"),
    "login page": (page, "a web page came, text/html, beginning '<!DOCTYPE html>"),
    "page without a type": (status(200, b"  <html>Log in</html>"), "a web page came, of no type"),
    "another size": (status(200, b"x" * 999), "999 bytes, the index has"),
    "flipped each time": (flipped(800), "sha256=[0-9a-f]{12}, the index has [0-9a-f]{12}, 3 times"),
    "always cut at the start": (cut(0, with_length=False), "the body ended after 0 of [0-9]+ bytes; 4 attempts"),
}


@pytest.mark.parametrize("case", FOR_GOOD)
def test_faults_that_stay(server: FaultyServer, folder: Path, tmp_path: Path, case: str) -> None:
    fault, message = FOR_GOOD[case]
    dataset = ShardDataset.open(f"{server.url.replace('//', '//me:secret@')}/train?token=secret", remote=remote(tmp_path))
    dataset.features(2, "center", 0, 2)
    server.faults = {FIRST: [fault] * 40}
    with pytest.raises(FetchError, match=message) as caught:
        dataset.features(0, "center", 0, 2)
    assert str(caught.value).startswith(f"{server.url}/train/{FIRST}: ")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    dataset.close()
    check_clean(tmp_path, folder, 1)


def test_an_object_that_changes_while_it_is_read(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    for fault in (changed, status(412)):
        server.faults = {FIRST: [cut(3000), fault]}
        dataset = ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path))
        with pytest.raises(FetchError, match=f"{FIRST}: the object changed while it was read"):
            dataset.features(0, "center", 0, 2)
        assert server.requests[-1].headers["Range"] == "bytes=3000-"
        assert server.requests[-1].headers["If-Match"].startswith('"')
        dataset.close()
        check_clean(tmp_path, folder)


def test_a_connection_that_only_drips_is_given_up(
    server: FaultyServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_http, "STALL_BYTES", 1000)
    server.faults = {FIRST: [dripping]}
    dataset = ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path, stall_s=0.3))
    assert same(dataset, folder) and dataset.files.counters.retries == 1
    assert int(server.requests[2].headers["Range"][6:-1]) >= 1, "what dripped in was kept"
    dataset.close()
    check_clean(tmp_path, folder, 0, 1, 2, 3)


def test_no_server_at_all(tmp_path: Path) -> None:
    with FaultyServer(tmp_path) as server:
        url = server.url
    with pytest.raises(FetchError, match="train/index.json: Connection refused; 2 attempts"):
        ShardDataset.open(f"{url}/train?token=secret", remote=remote(tmp_path, attempts=2))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(404), "status 404"),
        (page, "a web page came"),
        (status(200, b'{"format": "slotstr'), "must be one whole JSON object"),
        (status(200, b"[1]"), "holds a JSON list"),
        (status(200, b'{"format": "other"}'), "format='other'"),
    ],
)
def test_an_index_that_cannot_be_used(server: FaultyServer, tmp_path: Path, fault: object, message: str) -> None:
    server.faults = {"index.json": [fault] * 9}  # type: ignore[list-item]
    with pytest.raises(DataError, match=f"{server.url}/train/index.json: .*{message}"):
        ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path))
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [tmp_path / "cache/shards/room.lock"]


def test_an_index_that_comes_damaged_once_is_fetched_again(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    text = (folder / "index.json").read_text()
    edited = json.dumps(json.loads(text) | {"codec_error": 0.5}).encode()
    server.faults = {"index.json": [status(200, edited), cut(500, with_length=False), cut(700)]}
    dataset = ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path))
    assert dataset.index.version == DatasetIndex.load(folder).version
    dataset.close()


def test_a_restart_needs_no_transfer_and_no_server(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    for start in range(2):
        dataset = ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path))
        assert same(dataset, folder)
        hits = dataset.files.counters
        assert (hits.cache_misses, hits.cache_hits) == ((4, 0) if start == 0 else (0, 4))
        dataset.close()
    assert server.asked(".tar") == 4 and server.requests[-1].headers["If-None-Match"].startswith('"')
    server.faults = {"index.json": [status(503)] * 9}
    dataset = ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path))
    assert same(dataset, folder)
    dataset.close()
    server.faults = {"index.json": [status(404)]}
    with pytest.raises(FetchError, match="404"):  # gone for good is not the same as away for a while
        ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path))


def test_another_dataset_at_the_same_address_is_noticed(tmp_path: Path) -> None:
    write_split(tmp_path / "a", frames=((4,),))
    other = write_split(tmp_path / "b", frames=((6, 5),))
    with FaultyServer(tmp_path / "a") as server:
        ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path)).close()
        server.folder = tmp_path / "b"
        dataset = ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path))
        assert same(dataset, other)
        dataset.close()


def test_a_shard_that_rots_in_the_cache_is_fetched_again(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    dataset = ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path))
    assert same(dataset, folder)
    for path in (tmp_path / "cache" / "shards").glob("*.tar"):
        flip_byte(path, 700)
    assert same(dataset, folder)
    assert dataset.files.counters.corrupt >= 1
    dataset.close()


def test_a_rotten_shard_that_another_thread_has_mended_is_read_again(
    server: FaultyServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path))
    assert same(dataset, folder)
    for path in (tmp_path / "cache" / "shards").glob("*.tar"):
        flip_byte(path, 700)
    mend = dataset.files.mend

    def after_another(shard: int) -> bool:
        """The other thread met the same bytes, and was quicker."""
        mend(shard)
        dataset.files.prefetch([shard])
        return mend(shard)

    monkeypatch.setattr(dataset.files, "mend", after_another)
    assert same(dataset, folder)
    assert dataset.files.counters.corrupt >= 1
    dataset.close()


def test_shards_are_fetched_ahead_in_the_order_of_the_plan(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    dataset = ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path, streams=1))
    dataset.files.prefetch([3, 1, 0])
    while not isinstance(dataset.files, CachedFiles) or len(dataset.files._held) < 3:
        time.sleep(0.002)
    asked = [request.path.rsplit("/", 1)[1] for request in server.requests[1:]]
    assert asked == ["train-000003.tar", "train-000001.tar", "train-000000.tar"]
    dataset.features(0, "center", 0, 2)
    assert len(server.requests) == 4, "the read found its shard there"
    dataset.close()
    check_clean(tmp_path, folder, 0, 1, 3)


def test_a_small_cache_keeps_what_the_plan_wants_next(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    sizes = [shard["bytes"] for shard in DatasetIndex.load(folder).shards]
    config = remote(tmp_path, streams=1, cache_bytes=str(sizes[0] + max(sizes)))
    dataset = ShardDataset.open(f"{server.url}/train", remote=config)
    dataset.files.prefetch([0])
    for sample in (2, 3, 4, 2, 3, 4):  # one sample in each of the shards 1, 2, 3
        dataset.features(sample, "center", 0, 2)
        held = sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").glob("*.tar"))
        assert held <= sizes[0] + max(sizes)
    asked = server.asked(FIRST)
    dataset.features(0, "center", 0, 2)
    assert asked == server.asked(FIRST) == 1
    assert server.asked(SECOND) == 2
    dataset.close()


def test_closing_ends_a_wait(server: FaultyServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.remote.patience.FIRST_WAIT_S", 60.0)
    waiting = threading.Event()
    server.faults, server.on_request = {FIRST: [status(503)] * 9}, lambda path: waiting.set() if path.endswith(FIRST) else None
    dataset = ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path))
    dataset.files.prefetch([0])
    assert waiting.wait(10)
    dataset.close()
    check_clean(tmp_path, folder)


@pytest.mark.parametrize("mode", ["whole", "ranges"])
def test_closing_the_loader_ends_the_wait_of_its_reads(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr("data_pipeline.remote.patience.FIRST_WAIT_S", 60.0)
    waiting, errors = threading.Event(), []
    server.faults, server.on_request = {".tar": [status(503)] * 99}, lambda path: waiting.set() if ".tar" in path else None
    config = data_config(server.url, remote=remote(tmp_path, mode=mode), max_skip_fraction=1.0)
    loader = ClipLoader(config, World(), seed=0, global_batch=2)

    def train() -> None:
        try:
            next(loader)
        except FetchError as error:
            errors.append(str(error))

    thread = threading.Thread(target=train)
    thread.start()
    assert waiting.wait(20)
    loader.close()
    thread.join(20)
    assert not thread.is_alive() and "because the reader was closed" in errors[0]
    assert loader.skipped == 0, "no sample is left out for what the network did"


def test_another_way_to_the_shards_is_no_other_run(tmp_path: Path) -> None:
    from trainer.run_folder import _is_free

    assert _is_free("data.remote.mode") and _is_free("data.root") and not _is_free("data.clip_len")


def test_a_folder_that_cannot_be_written(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="data.remote.cache_dir=.*Not a directory"):
        ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path))


READ_ALL = """
import sys
from data_pipeline.config import RemoteConfig
from data_pipeline.store import ShardDataset
dataset = ShardDataset.open(sys.argv[1], remote=RemoteConfig(cache_dir=sys.argv[2], attempts=2))
try:
    for sample in range(len(dataset)):
        dataset.features(sample, "center", 0, 2)
finally:
    dataset.close()
    print(dataset.files.counters.cache_misses)
"""


def test_a_full_disk(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    """On a tiny file system where one may be mounted, else with a limit on the size of files, which fails at the same call."""
    cache = tmp_path / "cache"
    cache.mkdir()
    command = [sys.executable, "-c", READ_ALL, f"{server.url}/train", str(cache)]
    mounted = [
        "unshare",
        "-m",
        "sh",
        "-c",
        f'mount -t tmpfs -o size=32k none {cache} && "$@"; find {cache} -type f',
        "sh",
        *command,
    ]
    small = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    result = subprocess.run(
        mounted if small else command,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        preexec_fn=None if small else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    error = result.stderr.strip().splitlines()[-1]
    assert "FetchError" in error and f"{server.url}/train/{FIRST}: cache {cache}/shards: " in error
    assert "No space left on device" in error if small else "File too large" in error
    left = result.stdout.split()[1:] if small else [str(path) for path in cache.rglob("*") if path.is_file()]
    assert not [path for path in left if path.endswith((".part", ".tar", ".lock")) and not path.endswith("room.lock")]


def test_two_jobs_share_a_cache(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    server.on_request = lambda path: time.sleep(0.05)
    command = [sys.executable, "-c", READ_ALL, f"{server.url}/train", str(tmp_path / "cache")]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    misses = [int(job.communicate(timeout=60)[0]) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert sum(misses) == 4 and server.asked(".tar") == 4, "each shard came once"
    check_clean(tmp_path, folder, 0, 1, 2, 3)


def test_a_job_that_is_killed_while_it_fetches(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    server.faults = {FIRST: [dripping]}
    command = [sys.executable, "-c", READ_ALL, f"{server.url}/train", str(tmp_path / "cache")]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    while not list((tmp_path / "cache").glob("shards/*.part")):
        time.sleep(0.01)
    job.kill()
    job.wait()
    assert list((tmp_path / "cache").glob("shards/*.part")), "this is what it left"
    dataset = ShardDataset.open(f"{server.url}/train", remote=remote(tmp_path))
    assert same(dataset, folder)
    dataset.close()
    check_clean(tmp_path, folder, 0, 1, 2, 3)


def test_verify_over_the_net(server: FaultyServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert verify([f"{server.url}?token=secret"]) == 0
    assert f"{server.url}/train: 4 shards" in (said := capsys.readouterr().out) and "sound" in said and "secret" not in said
    server.faults = {FIRST: [flipped(700)], SECOND: [status(404)]}
    assert verify([f"{server.url}/train", "--threads", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "video-0_0.center.features.npy: crc32c=" in lines[0] and "sha256=" in lines[1] and "status 404" in lines[2]
    server.faults = {SECOND: [status(404)]}
    assert verify([f"{server.url}/train", "--quick"]) == 1
    assert sum(os.path.basename(line.split(": ")[0]) == SECOND for line in capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(DataError, match="no index.json here or in train, validation, test below"):
        verify([f"{server.url}/nothing"])


def test_commands_give_up_on_a_server_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each split that there might be; a refusal is no reason to give up: it may only mean that nothing is there."""
    monkeypatch.setattr("data_pipeline.remote.splits.RemoteConfig", lambda: remote(tmp_path, attempts=1))
    with FaultyServer(write_split(tmp_path, frames=((4,),)).parent) as server:
        server.faults = {"index.json": [status(403)]}
        assert find_splits(server.url) == [f"{server.url}/train"]
        server.faults, server.requests[:] = {"index.json": [status(503)] * 9}, []
        with pytest.raises(FetchError, match="status 503; 1 attempts"):
            find_splits(server.url)
        assert len(server.requests) == 1


def test_inspect_of_a_server_without_ranges(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own web server is such a one: whole shards come then, through the cache."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "node"))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    handler = partial(QuietHandler, directory=folder.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert inspect([f"{url}/train", "--out", str(tmp_path), "--videos", "1", "--frames", "1"]) == 0
        server.shutdown()
    assert (tmp_path / "train.png").is_file() and list((tmp_path / "node").rglob("*.tar"))


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
