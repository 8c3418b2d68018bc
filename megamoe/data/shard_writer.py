"""Writes one .bin/.idx pair: hashed, and its ids checked, while it is written."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from megamoe.data.corpus_record import ShardRecord
from megamoe.data.index_file import write_index
from megamoe.utils.disk import flush, write_file

BLOCK = 256 << 10  # bytes that are read at once of a .bin on an object store, whose samples are read in random order
HASH_SIZE = 8  # bytes


def block_hash(block: bytes) -> bytes:
    """HASH_SIZE bytes, against errors and not against forgery."""
    return hashlib.blake2b(block, digest_size=HASH_SIZE).digest()


class ShardWriter:
    """Appends documents to PREFIX.bin and, when closed, writes PREFIX.idx, and PREFIX.sums with the hash of each
    block."""

    def __init__(self, prefix: Path, dtype: type):
        """
        Args:
            dtype: of `token_dtype`.
        """
        self._prefix = prefix
        self._dtype = dtype
        self._file = open(f"{prefix}.bin", "xb")  # noqa: SIM115
        self._hash = hashlib.sha256()
        self._ends: list[np.ndarray] = [np.zeros(1, np.int64)]  # places after which documents end
        self._tokens = self._bytes = self._largest = 0

    def add(self, ids: list[int] | np.ndarray, num_bytes: int, ends: np.ndarray | None = None) -> None:
        """Add the token ids of documents, or of parts of them, whose text has so many bytes.

        Args:
            ends: (N,), rising places in `ids` after which documents end; by default that of its last.
        """
        tokens = np.asarray(ids)
        if len(tokens):
            assert tokens.min() >= 0, "vocabulary_of"
            self._largest = max(self._largest, int(tokens.max()))
        data = tokens.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._bytes += num_bytes
        self._ends.append(self._tokens + (np.array([len(tokens)]) if ends is None else ends))
        self._tokens += len(tokens)

    @property
    def lengths(self) -> np.ndarray:
        """(documents,): tokens of each."""
        return np.diff(np.concatenate(self._ends))

    def close(self) -> ShardRecord | None:
        """Write the other files and flush all to disk; None, and no files, where there is no token."""
        self._file.close()
        if not self._tokens:
            Path(self._file.name).unlink()
            return None
        index = Path(f"{self._prefix}.idx")
        write_index(index, self._dtype, self.lengths)
        with open(self._file.name, "rb") as file:
            sums = b"".join(map(block_hash, iter(lambda: file.read(BLOCK), b"")))
        write_file(Path(f"{self._prefix}.sums"), sums)
        for path in (index, Path(self._file.name)):
            flush(path)
        return ShardRecord(
            name=self._prefix.name,
            documents=len(self.lengths),
            tokens=self._tokens,
            bytes=self._bytes,
            largest_id=self._largest,
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(index.read_bytes()).hexdigest(),
            sums_sha256=hashlib.sha256(sums).hexdigest(),
        )
