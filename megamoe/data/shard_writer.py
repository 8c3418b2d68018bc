"""Writes one .bin/.idx pair, whose ids are checked while they are written, and hashes it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from megamoe.data.corpus_record import ShardRecord, shard_record
from megamoe.data.encoder import Encoder
from megamoe.data.index_file import write_index
from megamoe.utils.disk import flush, write_file
from megamoe.utils.errors import UserError

BATCH = 1 << 20  # characters handed to the encoder together: more do not stay in the cache
BLOCK = 256 << 10  # bytes that are read at once of a .bin on an object store, whose samples are read in random order
HASH_SIZE = 8  # bytes


def block_hash(block: bytes) -> bytes:
    """HASH_SIZE bytes, against errors and not against forgery."""
    return hashlib.blake2b(block, digest_size=HASH_SIZE).digest()


class ShardWriter:
    """Encodes documents into PREFIX.bin; when closed, writes PREFIX.idx, and PREFIX.sums with the hash of each block.
    Every document begins with what the tokenizer puts before a text (of most, nothing), and ends in its end-of-text
    token."""

    def __init__(self, prefix: Path, encode: Encoder, end_id: int, place: str = ""):
        """
        Args:
            place: of the documents, for errors.
        """
        self._prefix = prefix
        self._encode = encode
        self._between = [end_id, *encode.prefix]
        self._place = place
        self._file = open(f"{prefix}.bin", "xb")  # noqa: SIM115
        self._batch: list[str] = []
        self._size = 0  # characters of the batch
        self._lengths = [np.zeros(0, np.int64)]
        self._bytes = self._largest = 0

    @property
    def lengths(self) -> np.ndarray:
        """(documents,): tokens of each that is written."""
        return np.concatenate(self._lengths)

    def add(self, document: str) -> None:
        """Add a document. Raises UserError as `Encoder`."""
        if self._batch and self._size + len(document) > BATCH:
            self._write()
        self._batch.append(document)
        self._size += len(document)

    def _write(self) -> None:
        try:
            ids, counts = self._encode(self._batch)
        except UserError as error:
            raise UserError(f"{self._place}: {error}") from None
        added = len(self._between)
        ids = np.insert(ids, np.repeat(np.cumsum(counts), added), np.tile(self._between, len(counts)))
        ids = np.roll(ids, added - 1)  # what stands after the last document stands before the first
        self._largest = max(self._largest, int(ids.max()))
        assert self._largest <= np.iinfo(self._encode.dtype).max
        self._file.write(ids.astype(self._encode.dtype).tobytes())
        self._bytes += sum(len(text.encode()) for text in self._batch)
        self._lengths.append(counts + added)
        self._batch, self._size = [], 0

    def close(self) -> ShardRecord | None:
        """Write the other files and flush all to disk; None, and no files, where there is no document."""
        if self._batch:
            self._write()
        self._file.close()
        data, index = Path(self._file.name), Path(f"{self._prefix}.idx")
        lengths = self.lengths
        if not len(lengths):
            data.unlink()
            return None
        write_index(index, self._encode.dtype, lengths)
        with open(data, "rb") as file:
            sums = b"".join(map(block_hash, iter(lambda: file.read(BLOCK), b"")))
        write_file(Path(f"{self._prefix}.sums"), sums)
        for path in (index, data):
            flush(path)
        counts = {"documents": len(lengths), "tokens": int(lengths.sum()), "bytes": self._bytes}
        return shard_record(self._prefix, **counts, largest_id=self._largest)
