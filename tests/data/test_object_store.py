"""Corpora on object stores: S3 on loopback, and fsspec's store in memory."""

import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from corpora import prepared
from ranks import run_ranks
from refusals import has, refusal
from s3_server import S3Server, use

from megamoe.data import object_store
from megamoe.data.cache import Cache
from megamoe.data.shard_writer import BLOCK
from megamoe.data.sources import Location, locate, open_corpus, open_source
from megamoe.utils.errors import PeerError, Problems

SEQ_LEN = 20_000
GIB = 1 << 30
buckets = map("corpus-{}".format, itertools.count())


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder with shards of 4, 1 and 2 blocks."""
    draw, shards = np.random.default_rng(0), ([3, 200_000, 250_000, 7], [900], [50_000, 100_000])
    documents = [[draw.integers(0, 50_000, length) for length in shard] for shard in shards]
    return prepared(tmp_path_factory.mktemp("local") / "mine", {"train": documents}, 50_000).parent


@pytest.fixture(scope="module")
def expected(local):
    return samples(open_train(Location(local)))


@pytest.fixture(scope="module")
def server():
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def environment(server, monkeypatch):
    server.restart()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    system = fsspec.get_filesystem_class("s3")
    system.clear_instance_cache()
    monkeypatch.setattr(system, "retries", 1)  # of its own


@pytest.fixture
def url(server, local):
    return server.upload(local, next(buckets))


def open_train(location):
    return open_corpus(location, "train", SEQ_LEN, 50_000, True)


def open_remote(url, cache, limit=GIB):
    return open_train(locate(url, Cache(str(cache), limit)))


def samples(source):
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda index: source.sample(index, ahead=1), range(source.num_samples))
        return [[part.tolist() for part in sample] for sample in found]


def read_twice(variables, url, cache, limit, expected):
    use(variables)
    corpus = open_remote(url, cache, limit)
    return all(samples(corpus) == expected for _ in range(2))


def test_samples_are_those_of_the_local_folder_and_a_later_run_reads_none_again(server, local, expected, url, tmp_path):
    corpus, own = open_remote(url, tmp_path), open_train(Location(local))
    assert server.asked == ["corpus.json"]
    assert corpus.sample(13).ids.tolist() == own.sample(13).ids.tolist()
    named = ["corpus.json", "train-00000.bin", "train-00000.idx", "train-00000.sums"]
    assert sorted(server.asked) == sorted([*named, "train-00000.bin"])  # its two blocks
    assert samples(corpus) == expected
    assert corpus.fingerprint == own.fingerprint
    places = locate(url, Cache(str(tmp_path), GIB)), Location(local)
    packed = [samples(open_source(place, SEQ_LEN, 50_000, False, "best_fit")) for place in places]
    assert packed[0] == packed[1]
    server.restart()
    assert samples(open_remote(url, tmp_path)) == expected
    assert server.asked == ["corpus.json"]


@pytest.mark.parametrize("fault", ["slow", "500 Internal Server Error", "503 Slow Down", "half", "other", "gone"])
def test_samples_are_right_though_the_store_fails_now_and_then(server, expected, url, tmp_path, fault, monkeypatch):
    monkeypatch.setattr(object_store, "MAX_PAUSE", 0.2)
    remote = open_remote(url, tmp_path)
    server.fault = lambda number: fault if number % 3 == 1 or number in range(5, 15) else None
    assert samples(remote) == expected
    assert fault == "slow" or len(server.asked) > 12


def test_two_processes_share_a_cache_that_stays_below_its_bound(server, expected, url, tmp_path):
    limit = 6 * BLOCK
    assert all(run_ranks(2, read_twice, server.environment, url, tmp_path, limit, expected))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert 2 * BLOCK < sum(path.stat().st_size for path in files) < limit
    server.restart()
    assert samples(open_remote(url, tmp_path)) == expected
    assert any(name.endswith(".bin") for name in server.asked)  # what the bound has removed


def test_what_is_damaged_in_the_cache_is_read_again(expected, url, tmp_path):
    samples(open_remote(url, tmp_path))
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert samples(open_remote(url, tmp_path)) == expected


def test_a_store_that_is_gone_for_good_ends_the_run_for_a_restart(server, url, tmp_path, monkeypatch):
    corpus = open_remote(url, tmp_path)
    monkeypatch.setattr(object_store, "PATIENCE", 0.5)
    server.fault = lambda number: "gone"
    with pytest.raises(PeerError):
        Problems().attempt(open_remote, url, tmp_path)  # no problem of the configuration
    with pytest.raises(PeerError) as caught:
        corpus.sample(0)
    has(str(caught.value), f"{url}/train-00000", "could not be read", "start again")


def test_what_the_user_can_change_is_said(server, local, url, tmp_path, monkeypatch):
    def said(path):
        return refusal(open_remote, path, tmp_path)

    has(said("s3://no-such-bucket/mine"), "s3://no-such-bucket/mine", "bucket does not exist", "correct the path")
    has(said(url.replace("mine", "other")), f"{url.replace('mine', 'other')}", "megamoe prepare")
    has(said("nothing://x/y"), "nothing://x/y", "nothing", "s3://")
    system = fsspec.filesystem("s3")
    data = bytearray((local / "train-00000.bin").read_bytes())
    data[BLOCK] ^= 1
    system.pipe(f"{url}/train-00000.bin", bytes(data))
    corpus = open_remote(url, tmp_path)
    assert corpus.sample(0).ids.shape == (SEQ_LEN,)
    has(refusal(corpus.sample, 7), f"block 1 of {url}/train-00000.bin", "hash", "upload the folder again")
    system.rm(f"{url}/train-00001.idx")
    system.pipe(f"{url}/train-00002.bin", b"odd")
    has(said(url), f"{url} lacks train-00001.idx, the end of train-00002.bin;", "upload")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    type(system).clear_instance_cache()
    has(said(url), url, "redentials", "set")
    for name in [name for name in sys.modules if name.startswith("s3fs")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    has(said(url), url, "s3fs", "pip install 'megamoe[s3]'")
