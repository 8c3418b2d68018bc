"""Megatron's .idx: the number type of the tokens in a .bin, the length of each item and the items that documents begin
with."""

from __future__ import annotations

import bisect
import mmap
import struct
from pathlib import Path

import numpy as np

from megamoe.utils.errors import UserError
from megamoe.utils.json_files import check_regular

HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, items, document starts
START = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little")  # magic and the version, of which there is no other
# What each dtype code may mean. DeepSpeed's table and Megatron-LM's agree up to 5; 8 is uint64 in one and uint16 in the
# other, so the size of the .bin decides.
DTYPES: dict[int, tuple[type, ...]] = {
    1: (np.uint8,), 2: (np.int8,), 3: (np.int16,), 4: (np.int32,), 5: (np.int64,),
    6: (np.uint16,), 7: (np.uint32,), 8: (np.uint64, np.uint16),
}  # fmt: skip
WRITTEN: dict[type, int] = {np.int16: 3, np.int32: 4, np.uint16: 8}  # by Megatron-LM's codes


def token_dtype(vocab_size: int) -> type:
    """The narrowest type of a vocabulary's ids that Megatron-LM reads. DeepSpeed's reader takes uint16 for uint64."""
    return np.int16 if vocab_size <= 1 << 15 else np.uint16 if vocab_size <= 1 << 16 else np.int32


def write_index(path: Path, dtype: type, lengths: np.ndarray) -> None:
    """Write the .idx of a .bin whose documents have so many tokens each, an item per document."""
    lengths = np.asarray(lengths, np.int32)
    places = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=places[1:])
    with open(path, "xb") as file:
        file.write(START + HEADER.pack(b"", 0, WRITTEN[dtype], len(lengths), len(lengths) + 1)[len(START) :])
        for part in (lengths, places * np.dtype(dtype).itemsize, np.arange(len(lengths) + 1, dtype=np.int64)):
            part.tofile(file)


class IndexFile:
    """An .idx, memory-mapped."""

    def __init__(self, path: Path, bin_path: Path, bin_size: int):
        """Raises UserError where it is not whole, or does not describe a .bin of `bin_size` bytes."""
        size = check_regular(path, "a .bin/.idx pair")
        with open(path, "rb") as stream:
            header = stream.read(HEADER.size)
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        if len(header) < HEADER.size or not header.startswith(START):
            raise UserError(f"{path} is not a Megatron index of version 1; prepare the corpus again.")
        _, _, code, items, documents = HEADER.unpack(header)
        expected = HEADER.size + items * (4 + 8) + documents * 8
        if size != expected:
            raise UserError(
                f"{path} is {size} bytes, not the {expected} of its {items} items; prepare the corpus again."
            )
        if not items or not bin_size:
            raise UserError(f"corpus {path.with_suffix('')} is empty; give one with text in it.")
        if code not in DTYPES:
            raise UserError(f"{path} has dtype code {code}, which is not one of integers; prepare it again.")
        lengths = np.frombuffer(content, np.int32, items, HEADER.size)
        self._places = np.frombuffer(content, np.int64, items, HEADER.size + items * 4)  # in bytes
        self._firsts = np.frombuffer(content, np.int64, documents, HEADER.size + items * 12)  # items
        last, length = int(self._places[-1]), int(lengths[-1])
        fitting = [one for one in DTYPES[code] if bin_size == last + length * np.dtype(one).itemsize]
        if not fitting or min(last, length) < 0 or bin_size % np.dtype(fitting[0]).itemsize:
            described = last + length * np.dtype(DTYPES[code][0]).itemsize
            raise UserError(
                f"{path} describes {described} bytes of whole tokens, but {bin_path} has {bin_size}; they belong to "
                "different corpora: prepare it again."
            )
        self.dtype = fitting[0]
        self.num_tokens = bin_size // np.dtype(self.dtype).itemsize

    def starts(self, start: int, stop: int) -> np.ndarray:
        """The tokens from `start` on and before `stop` that begin a document, (N,) int64. Reads a few pages only."""
        width, items = np.dtype(self.dtype).itemsize, len(self._places)

        def place(item: int) -> int:
            return int(self._places[item]) // width if item < items else self.num_tokens

        first = bisect.bisect_left(self._firsts, start, key=place)
        end = bisect.bisect_left(self._firsts, stop, lo=first, key=place)
        places = self._places[self._firsts[first:end]] // width
        return places[np.diff(places, prepend=-1) > 0]  # an empty document begins where the next one does
