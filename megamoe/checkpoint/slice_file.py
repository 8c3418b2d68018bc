"""One rank's file of a checkpoint: flat tensors in the safetensors container, hashed in blocks.

Any safetensors reader opens such a file. It is written and read here, since the state must not be in memory twice, a
reader takes ranges and has to know that their bytes are those that were saved, and a file that shrinks under a mapping
would kill the process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from megamoe.utils.errors import UserError

BLOCK_BYTES = 1 << 24
MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it
ALIGNMENT = 8  # of the first tensor
# The container's name of what an optimizer may keep, by torch's.
CONTAINER_DTYPES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float64": "F64",
    "int8": "I8",
    "uint8": "U8",
}


class Record(BaseModel):
    """What a checkpoint says about a part of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class TensorRecord(Record):
    """Of one flat tensor of a rank's file."""

    dtype: str = Field(pattern=f"^({'|'.join(CONTAINER_DTYPES)})$")
    """As torch names it."""
    offset: int = Field(ge=0, lt=2**53)
    """Of its first byte in the file."""
    sha256: list[str]
    """Of each block of at most BLOCK_BYTES of its bytes, in order."""

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return getattr(torch, self.dtype).itemsize


def number_of_blocks(nbytes: int) -> int:
    """Blocks that are hashed of a tensor of that size."""
    return -(-nbytes // BLOCK_BYTES)


def sha256(data: Any) -> str:
    """SHA-256 of a buffer, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]


# --- writing --------------------------------------------------------------------------------------------------------


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> tuple[str, dict[str, TensorRecord]]:
    """Write a new file of flat tensors, each (N,), in their order; returns the SHA-256 of its header, and what the
    index says about each tensor.

    The bytes are not yet on the disk: see `disk.flush`. Raises OSError, also where `path` exists.
    """
    header = _header(tensors, metadata)
    records = {}
    with open(path, "xb") as file, ThreadPoolExecutor(1) as hasher:
        file.write(header)
        offset = len(header)
        for name, tensor in tensors.items():
            hashes = []
            for block in tensor.detach().split(BLOCK_BYTES // tensor.dtype.itemsize) if len(tensor) else ():
                data = _as_bytes(block.contiguous().cpu())
                hashed = hasher.submit(sha256, data)
                file.write(data)
                hashes.append(hashed.result())
            records[name] = TensorRecord(dtype=_dtype_name(tensor.dtype), offset=offset, sha256=hashes)
            offset += tensor.nbytes
    return sha256(header), records


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": CONTAINER_DTYPES[_dtype_name(tensor.dtype)],
            "shape": [len(tensor)],
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


# --- reading --------------------------------------------------------------------------------------------------------


class DamagedError(UserError):
    """A file that is not as it was saved."""


class SliceFile:
    """A rank's file, open for reading; what is read is compared with the hashes of the index."""

    def __init__(self, path: Path, nbytes: int, header: str):
        """
        Args:
            header: SHA-256 of its header, in which the id of the save stands.

        Raises DamagedError if it is missing, or has another size or header; OSError if it cannot be read now.
        """
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with this object
            size = os.fstat(self._file.fileno()).st_size
            found = sha256(self._header(size))
        except FileNotFoundError:
            raise DamagedError(f"{path} is missing; bring it back, or use an older checkpoint.") from None
        if size != nbytes:
            raise DamagedError(
                f"{path} has {size:,} bytes, not the {nbytes:,} that were saved; use an older checkpoint."
            )
        if found != header:
            raise DamagedError(
                f"{path} is not the file that was saved here: its header has changed, or it is of another save; use an "
                "older checkpoint."
            )

    def _header(self, size: int) -> bytes:
        length = self._file.read(8)
        return length + self._file.read(min(int.from_bytes(length, "little"), size, MOST_HEADER_BYTES))

    def read(self, record: TensorRecord, length: int, start: int, count: int) -> Tensor:
        """Values `start` to `start` + `count` of a tensor of `length` values, (count,), a view of the blocks that they
        lie in.

        Raises DamagedError if one of these is not what was saved.
        """
        size = record.itemsize
        first, last = start * size, (start + count) * size
        begins, ends = first // BLOCK_BYTES * BLOCK_BYTES, min(number_of_blocks(last) * BLOCK_BYTES, length * size)
        values = torch.empty((ends - begins) // size, dtype=getattr(torch, record.dtype))
        target = _as_bytes(values)
        for number, begin, end in _blocks(length * size, first, last):
            self._read_block(record, number, begin, target[begin - begins : end - begins])
        return values[start - begins // size :][:count]

    def verify(self, record: TensorRecord, length: int) -> None:
        """Read a tensor of `length` values block by block. Raises DamagedError if it is not what was saved."""
        nbytes = length * record.itemsize
        block = memoryview(bytearray(min(nbytes, BLOCK_BYTES)))
        for number, begin, end in _blocks(nbytes, 0, nbytes):
            self._read_block(record, number, begin, block[: end - begin])

    def _read_block(self, record: TensorRecord, number: int, begin: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._file.fileno(), [target[done:]], record.offset + begin + done)
            if not count:
                break  # it is shorter than it was
            done += count
        if [sha256(target)] != record.sha256[number : number + 1]:
            raise DamagedError(
                f"{self.path} has not the SHA-256 with which it was saved: its bytes have changed; use an older "
                "checkpoint."
            )


def _blocks(nbytes: int, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) in bytes of each block of a tensor of `nbytes` that bytes `first` to `last` touch."""
    for number in range(first // BLOCK_BYTES, number_of_blocks(last)):
        yield number, number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, nbytes)
