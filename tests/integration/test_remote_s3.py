"""Shards in a bucket: boto3 against a server that it takes for S3, directly and through a proxy that misbehaves; and training
clips from there and from a web server, by two processes that share a cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import RemoteConfig
from data_pipeline.errors import ConfigError, FetchError
from data_pipeline.loader import ClipLoader
from data_pipeline.order import World
from data_pipeline.shards import DatasetIndex
from data_pipeline.store import ShardDataset
from data_pipeline.verify import main as verify
from tests.integration.faulty_server import FaultyServer, changed, cut, flipped, page, status
from tests.unit.tiny_shards import data_config, write_split

FIRST = "train-000000.tar"
BUCKET, PREFIX = "shards-of-tests", "sets/my movi"
SECRET = "a-secret-that-must-not-be-seen"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("uploaded"), frames=((4, 6), *((2, 3 + number % 3) for number in range(9))))


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[str]:
    """The URL of a server with the shards in a bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    session = boto3.Session(aws_access_key_id="me", aws_secret_access_key=SECRET, region_name="us-east-1")
    client = session.client("s3", endpoint_url=url)
    client.create_bucket(Bucket=BUCKET)
    for path in folder.iterdir():
        client.put_object(Bucket=BUCKET, Key=f"{PREFIX}/train/{path.name}", Body=path.read_bytes(), ACL="public-read")
    yield url
    server.stop()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("data_pipeline.remote.patience.FIRST_WAIT_S", 0.002)
    for name in [name for name in os.environ if name.startswith(("AWS_", "GS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


def remote(tmp_path: Path, **changes: object) -> RemoteConfig:
    return RemoteConfig(**{"cache_dir": str(tmp_path / "cache"), "stall_s": 5.0, "attempts": 4, **changes})  # type: ignore[arg-type]


def same(dataset: ShardDataset, folder: Path) -> bool:
    local = ShardDataset.open(folder)
    return all(
        np.array_equal(dataset.features(sample, "center", 0, 2), local.features(sample, "center", 0, 2))
        for sample in range(len(local))
    )


def files_of(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "shards").iterdir()} - {"room.lock"}


@pytest.mark.parametrize("mode", ["whole", "ranges"])
def test_a_bucket_by_the_variable_that_boto3_knows(
    s3: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    dataset = ShardDataset.open(f"s3://{BUCKET}/{PREFIX}/train", remote=remote(tmp_path, mode=mode))
    assert same(dataset, folder)
    assert dataset.folder == f"s3://{BUCKET}/{PREFIX}/train"
    dataset.close()
    assert verify([f"s3://{BUCKET}/{PREFIX}"]) == 0


@pytest.mark.parametrize("mode", ["whole", "ranges"])
def test_faults_in_front_of_a_bucket(s3: str, folder: Path, tmp_path: Path, mode: str) -> None:
    with FaultyServer(upstream=s3) as proxy:
        slow_down = status(503, b"<Error><Code>SlowDown</Code></Error>")
        proxy.faults = {FIRST: [slow_down, cut(50), cut(40, with_length=False), flipped(9)]}
        config = remote(tmp_path, mode=mode, endpoint=proxy.url)
        dataset = ShardDataset.open(f"s3://{BUCKET}/{PREFIX}/train", remote=config)
        assert same(dataset, folder)
        assert (dataset.files.counters.retries, dataset.files.counters.corrupt) == (3, 1)
        dataset.close()
        assert all("X-Amz-Signature=" in request.path for request in proxy.requests)
    if mode == "whole":
        assert files_of(tmp_path) == {f"{shard['sha256']}.tar" for shard in dataset.index.shards}


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([status(404, b"<Error><Code>NoSuchKey</Code></Error>")], "status 404 NoSuchKey"),
        ([status(403, b"<Error><Code>AccessDenied</Code></Error>")], "status 403 AccessDenied; .*without that a missing object"),
        ([status(301, b"", x_amz_bucket_region="eu-west-1")], "the bucket lies in region eu-west-1; set AWS_REGION=eu-west-1"),
        ([page], "a web page came"),
        ([cut(2000), changed], "the object changed while it was read"),
        ([status(500)] * 4, "status 500; 4 attempts"),
    ],
)
def test_faults_of_a_bucket_that_stay(s3: str, tmp_path: Path, faults: list, message: str) -> None:
    with FaultyServer(upstream=s3) as proxy:
        dataset = ShardDataset.open(f"s3://{BUCKET}/{PREFIX}/train", remote=remote(tmp_path, endpoint=proxy.url))
        proxy.faults = {FIRST: list(faults)}
        with pytest.raises(FetchError, match=message) as caught:
            dataset.features(0, "center", 0, 2)
        dataset.close()
    text = str(caught.value)
    assert text.startswith(f"s3://{BUCKET}/{PREFIX}/train/{FIRST}: ") and "Amz" not in text and SECRET not in text
    assert files_of(tmp_path) == set()


def test_an_object_replaced_in_the_bucket_while_it_is_read(s3: str, folder: Path, tmp_path: Path) -> None:
    """No fault of ours: the server itself answers 412."""
    import boto3

    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    key = f"{PREFIX}/train/{FIRST}"
    with FaultyServer(upstream=s3) as proxy:
        proxy.faults = {FIRST: [cut(2000)]}
        dataset = ShardDataset.open(f"s3://{BUCKET}/{PREFIX}/train", remote=remote(tmp_path, endpoint=proxy.url))

        def replace(path: str) -> None:
            if proxy.asked(FIRST) == 2:
                client.put_object(Bucket=BUCKET, Key=key, Body=b"another")

        proxy.on_request = replace
        try:
            with pytest.raises(FetchError, match="the object changed while it was read"):
                dataset.features(0, "center", 0, 2)
        finally:
            client.put_object(Bucket=BUCKET, Key=key, Body=(folder / FIRST).read_bytes(), ACL="public-read")
        dataset.close()


def test_a_public_bucket_needs_no_credentials(s3: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with FaultyServer(upstream=s3) as proxy:
        for root in (f"s3://{BUCKET}/{PREFIX}/train", f"gs://{BUCKET}/{PREFIX}/train"):
            dataset = ShardDataset.open(root, remote=remote(tmp_path, endpoint=proxy.url, mode="ranges"))
            dataset.features(0, "center", 0, 2)
            dataset.close()
        assert not any("Signature" in request.path for request in proxy.requests)


def test_a_google_bucket_with_a_key(s3: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GS_ACCESS_KEY_ID", "GOOG1")
    monkeypatch.setenv("GS_SECRET_ACCESS_KEY", "another-secret")
    with FaultyServer(upstream=s3) as proxy:
        dataset = ShardDataset.open(f"gs://{BUCKET}/{PREFIX}/train", remote=remote(tmp_path, endpoint=proxy.url))
        assert same(dataset, folder)
        assert all("X-Amz-Credential=GOOG1" in request.path for request in proxy.requests)
        dataset.close()


def test_without_boto3_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"pip install 'slotstream\[s3\]'"):
        ShardDataset.open(f"s3://{BUCKET}/a", remote=remote(tmp_path))


def bytes_in(cache: Path) -> int:
    total = 0
    for path in (cache / "shards").glob("*.*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


# A rank's training, in a process of its own, from each address with each cache: prints what it read and what that cost.
RANK = """
import hashlib, json, sys
from data_pipeline.config import DataConfig, RemoteConfig
from data_pipeline.loader import ClipLoader
from data_pipeline.order import World
rank, world, steps = map(int, sys.argv[1:4])
for root, cache, size in json.loads(sys.argv[4]):
    remote = RemoteConfig(cache_dir=cache, cache_bytes=str(size), streams=1, stall_s=20.0)
    config = DataConfig(root=root, remote=remote, features="fake", image_size=12, clip_len=2, block_shards=2, read_threads=1)
    read = []
    with ClipLoader(config, World(rank, world), seed=3, global_batch=4) as loader:
        for _ in range(steps):
            batch = next(loader)
            read.append([batch.keys, batch.starts, hashlib.sha256(batch.features.numpy().tobytes()).hexdigest()])
        for sample in range(len(loader.dataset) if size == 10**9 else 0):
            loader.dataset.features(sample, "center", 0, 2)  # nothing is under way any more when the loader closes
        counters = loader.dataset.files.counters
    print(json.dumps([read, counters.cache_misses, counters.fetched_bytes]))
"""


def batches_of(folder: Path, rank: int, world: int, steps: int) -> list:
    """What a rank reads from the folder itself."""
    config, read = data_config(folder.parent, clip_len=2, block_shards=2), []
    with ClipLoader(config, World(rank, world), seed=3, global_batch=4) as loader:
        for _ in range(steps):
            batch = next(loader)
            read.append([list(batch.keys), list(batch.starts), hashlib.sha256(batch.features.numpy().tobytes()).hexdigest()])
    return read


@pytest.mark.slow
def test_two_processes_train_from_one_cache(s3: str, folder: Path, tmp_path: Path) -> None:
    """Same batches as from the folder; every byte comes once when the cache is large; its limit holds when it is small."""
    steps, world = 8, 2
    sizes = [shard["bytes"] for shard in DatasetIndex.load(folder).shards]
    large, small = 10**9, 4 * max(sizes)
    with FaultyServer(folder.parent) as web:
        roots = {"http": web.url, "s3": f"s3://{BUCKET}/{PREFIX}"}
        runs = [(root, str(tmp_path / f"{name}{size}"), size) for name, root in roots.items() for size in (large, small)]
        most = dict.fromkeys((cache for _, cache, _ in runs), 0)
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), str(world), str(steps), json.dumps(runs)],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=os.environ | {"AWS_ENDPOINT_URL": s3},
            )
            for rank in range(world)
        ]
        while any(rank.poll() is None for rank in ranks):
            most = {cache: max(seen, bytes_in(Path(cache))) for cache, seen in most.items()}
            time.sleep(0.005)
        said = [[json.loads(line) for line in rank.communicate()[0].splitlines()] for rank in ranks]
    expected = [batches_of(folder, rank, world, steps) for rank in range(world)]
    for number, (_, cache, limit) in enumerate(runs):
        answers = [lines[number] for lines in said]
        assert [read for read, _, _ in answers] == expected
        misses, fetched = (sum(answer[place] for answer in answers) for place in (1, 2))
        if limit == large:
            assert misses == len(sizes) and fetched == sum(sizes) == bytes_in(Path(cache))
        else:
            # What one rank holds open the other cannot remove.
            assert misses > len(sizes) and most[cache] <= limit + max(sizes) * world < sum(sizes)
        assert not list(Path(cache).glob("shards/*.part"))
