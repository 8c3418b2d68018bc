"""Prepared folders on object stores, read by fsspec into a cache: tokens in blocks, other files whole."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.config.model import validate
from megamoe.data.cache import Cache
from megamoe.data.corpus_record import NAME, CorpusRecord, ShardRecord
from megamoe.data.index_file import IndexFile
from megamoe.data.shard_writer import BLOCK, HASH_SIZE, block_hash
from megamoe.data.token_files import Shard
from megamoe.utils.errors import PeerError, UserError, first_line
from megamoe.utils.json_files import parse_json

# Seconds that a store may fail: less than the default of --collective_timeout, so that a run's end names the store.
PATIENCE = 240.0
TIMEOUT = 30.0  # seconds of a request
MAX_PAUSE = 15.0  # seconds
PART = 8 << 20  # bytes of a request
REMEDIES = {  # by the names of errors that waiting does not cure
    "FileNotFoundError": "upload a folder that megamoe prepare has made, or correct the path",
    "PermissionError": "set credentials that may read it",
    "NoCredentialsError": "set them as for the store's own tools",
    "DefaultCredentialsError": "set them as for the store's own tools",
    "ImportError": "pip install 'megamoe[s3]' or 'megamoe[gcs]'",
    "ValueError": "give s3:// or gs://, or a path",
}


class RemoteFolder:
    """A prepared folder on an object store; `path`, in the cache, holds what has been read of it."""

    def __init__(self, url: str, cache: Cache):
        """Raises UserError where it is absent, incomplete or may not be read; PeerError where the store does not
        answer."""
        import fsspec

        self.url, self.cache = url.rstrip("/"), cache
        self._system, self._root = ask(self.url, fsspec.url_to_fs, self.url)
        self._system.invalidate_cache()
        self._timeout = {"timeout": TIMEOUT} if self._system.async_impl else {}
        listed = ask(self.url, self._system.ls, self._root, detail=True, **self._timeout)
        self.sizes: dict[str, int] = {one["name"].rpartition("/")[2]: one["size"] for one in listed}
        data = self.read(NAME)
        record = validate(CorpusRecord, parse_json(data, f"{self.url}/{NAME}"), f"{self.url}/{NAME}")
        self._check_complete(record)
        digest = hashlib.sha256(data).hexdigest()
        self.path = cache.folder / digest[:32]  # with another record it is another corpus
        cache.get(self.path / NAME, f"{self.url}/{NAME}", lambda: data, lambda found: found == data)
        if record.tokenizer_sha256:
            self.fetch("tokenizer.json", record.tokenizer_sha256)

    def _check_complete(self, record: CorpusRecord) -> None:
        shards = [shard for split in record.splits.values() for shard in split.shards]
        wanted = [f"{shard.name}{end}" for shard in shards for end in (".bin", ".idx", ".sums")]
        wanted += ["tokenizer.json"] * bool(record.tokenizer_sha256)
        lacks = [name for name in wanted if not self.sizes.get(name)]
        lacks += [f"the end of {one.name}.bin" for one in shards if self.sizes.get(f"{one.name}.bin", 0) % one.tokens]
        if lacks:
            more = f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""
            raise UserError(f"{self.url} lacks {', '.join(lacks[:3])}{more}; upload the whole folder again.")

    def fetch(self, name: str, sha256: str | None) -> bytes:
        """A whole file, which is in the cache as `path`/NAME then."""
        read, place = partial(self.read, name), f"{self.url}/{name}"
        return self.cache.get(self.path / name, place, read, lambda data: hashlib.sha256(data).hexdigest() == sha256)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of a file on the store. Raises as `ask`."""
        stop = self.sizes.get(name, 1) if stop is None else stop
        places = [(at, min(at + PART, stop)) for at in range(start, stop, PART)]
        return b"".join(ask(f"{self.url}/{name}", self._read, name, *place) for place in places)

    def _read(self, name: str, start: int, stop: int) -> bytes:
        data: bytes = self._system.cat_file(f"{self._root}/{name}", start=start, end=stop, **self._timeout)
        if len(data) != stop - start:
            raise OSError(f"{len(data)} of {stop - start} bytes came")
        return data


class RemoteShard(Shard):
    """A shard whose .bin is read in blocks, and whose other files are copied when they are first needed."""

    def __init__(self, prefix: Path, record: ShardRecord, folder: RemoteFolder):
        self._folder, self._record = folder, record
        self._bin = f"{record.name}.bin"
        self._size = folder.sizes[self._bin]
        super().__init__(prefix, record)

    def _open_index(self) -> IndexFile:
        name = f"{self._record.name}.idx"
        self._folder.fetch(name, self._record.idx_sha256)
        return IndexFile(self._folder.path / name, Path(self._bin), self._size)

    def read(self, start: int, stop: int) -> np.ndarray:
        """As of a local one. Raises UserError or PeerError where the store does not give it."""
        width = self._size // self._record.tokens  # bytes of a token
        numbers = range(start * width // BLOCK, -(-stop * width // BLOCK))
        data = b"".join(map(self._block, numbers))
        return np.frombuffer(data, self.index.dtype, stop - start, start * width % BLOCK)

    def _block(self, number: int) -> bytes:
        start, stop = number * BLOCK, min((number + 1) * BLOCK, self._size)
        return self._folder.cache.get(
            self.prefix / str(number),
            f"block {number} of {self._folder.url}/{self._bin}",
            partial(self._folder.read, self._bin, start, stop),
            lambda data: block_hash(data) == self._sums()[number * HASH_SIZE :][:HASH_SIZE],
        )

    def _sums(self) -> bytes:
        return self._folder.fetch(f"{self._record.name}.sums", self._record.sums_sha256)


def ask(url: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a store answers, asked again for PATIENCE seconds. Raises UserError for what waiting does not cure, else
    PeerError."""
    began, pause = time.monotonic(), 0.25
    while True:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # each library has its own
            why, remedy = first_line(error).rstrip("."), REMEDIES.get(type(error).__name__)
            if remedy:
                raise UserError(f"{url} cannot be read ({why}); {remedy}.") from None
            if (seconds := time.monotonic() - began) > PATIENCE:
                raise PeerError(
                    f"{url} could not be read for {seconds:.0f} s ({why}); see that the store answers, and start again."
                ) from None
        time.sleep(pause * random.uniform(0.5, 1))  # not all ranks at once
        pause = min(2 * pause, MAX_PAUSE)
