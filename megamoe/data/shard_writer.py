"""Writes one .bin/.idx pair: hashed, and its ids checked, while it is written."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from megamoe.data.corpus_record import ShardRecord
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
        self._hash = hashlib.sha256()
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
        data = ids.astype(self._encode.dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._bytes += sum(len(text.encode()) for text in self._batch)
        self._lengths.append(counts + added)
        self._batch, self._size = [], 0

    def close(self) -> ShardRecord | None:
        """Write the other files and flush all to disk; None, and no files, where there is no document."""
        if self._batch:
            self._write()
        self._file.close()
        lengths = self.lengths
        if not len(lengths):
            Path(self._file.name).unlink()
            return None
        index = Path(f"{self._prefix}.idx")
        write_index(index, self._encode.dtype, lengths)
        with open(self._file.name, "rb") as file:
            sums = b"".join(map(block_hash, iter(lambda: file.read(BLOCK), b"")))
        write_file(Path(f"{self._prefix}.sums"), sums)
        for path in (index, Path(self._file.name)):
            flush(path)
        return ShardRecord(
            name=self._prefix.name,
            documents=len(lengths),
            tokens=int(lengths.sum()),
            bytes=self._bytes,
            largest_id=self._largest,
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(index.read_bytes()).hexdigest(),
            sums_sha256=hashlib.sha256(sums).hexdigest(),
        )
