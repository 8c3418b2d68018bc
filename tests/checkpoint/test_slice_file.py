"""A rank's file: any safetensors reader opens it, and every byte that is read is what was saved."""

import hashlib
import json
import os
import random

import numpy as np
import pytest
import torch
from indexed import flip_bit
from refusals import has, refusal
from safetensors import safe_open
from safetensors.torch import load_file

from megamoe.checkpoint import slice_file
from megamoe.checkpoint.slice_file import CONTAINER_DTYPES, DamagedError, SliceFile, write_tensors

METADATA = {"format": "pt", "save": "0123", "file": "rank_00000.safetensors"}
BLOCK_BYTES = 2**14  # here, so that a file of three blocks is small
LENGTH = 9_001  # of the large tensors: 36 kB in fp32, which ends in a third block
BLOCK = BLOCK_BYTES // 4  # values of fp32


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    assert slice_file.BLOCK_BYTES == 2**24  # of the files that there are
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slice_file, "BLOCK_BYTES", BLOCK_BYTES)
        yield


def small(draw=0):
    """Tensors of every type that an optimizer may keep, and an empty one."""
    generator = torch.Generator().manual_seed(draw)
    whole = {
        f"kind/{name}": (100 * torch.rand(37 + number, generator=generator)).to(getattr(torch, name))
        for number, name in enumerate(CONTAINER_DTYPES)
    }
    return {**whole, "kind/empty": torch.empty(0)}


def write(path, tensors):
    """Returns the records, and the file, open."""
    header, records = write_tensors(path, tensors, METADATA)
    return records, SliceFile(path, path.stat().st_size, header)


@pytest.fixture(scope="module")
def large(small_blocks, tmp_path_factory):
    """(path, header, records, values as numpy has them) of a file with two large tensors."""
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    values = torch.randn(2, LENGTH, generator=torch.Generator().manual_seed(0))
    tensors = {"fp32/x": values[0], "exp_avg/x": values[1].bfloat16()}
    header, records = write_tensors(path, tensors, METADATA)
    return path, header, records, {"fp32/x": values[0].numpy(), "exp_avg/x": tensors["exp_avg/x"].float().numpy()}


def test_the_safetensors_library_finds_the_values_by_kind_and_name_and_the_metadata(tmp_path):
    tensors = small()
    write(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == METADATA


def test_a_record_says_where_the_bytes_are_and_their_hash_block_by_block(large):
    path, header, records, values = large
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    assert header == hashlib.sha256(data[:end]).hexdigest()
    assert end % 8 == 0  # so that the first tensor is aligned
    assert json.loads(data[8:end])["__metadata__"] == METADATA
    for record, itemsize in zip(records.values(), (4, 2), strict=True):
        assert record.offset == end
        end += itemsize * LENGTH
        own = data[record.offset : end]
        blocks = [own[start : start + BLOCK_BYTES] for start in range(0, len(own), BLOCK_BYTES)]
        assert record.sha256 == [hashlib.sha256(block).hexdigest() for block in blocks]
        assert len(blocks) == {4: 3, 2: 2}[itemsize]
    assert end == len(data)
    on_disk = np.frombuffer(data, np.float32, LENGTH, records["fp32/x"].offset)
    assert np.array_equal(on_disk, values["fp32/x"])


def ranges(per_block):
    """Ranges that begin and end at, before and behind the borders of the blocks; all; some at random."""
    draw = random.Random(0)
    borders = [0, 1, LENGTH - 1, LENGTH]
    borders += [
        at for block in range(1, -(-LENGTH // per_block)) for at in range(per_block * block - 1, per_block * block + 2)
    ]
    pairs = [(first, last) for first in borders for last in borders if first <= last]
    pairs += [tuple(sorted(draw.choices(range(LENGTH), k=2))) for _ in range(5)]
    return pairs


def test_any_range_is_what_numpy_cuts_out_also_at_the_borders_of_blocks(large):
    path, header, records, values = large
    file = SliceFile(path, path.stat().st_size, header)
    for name, per_block in (("fp32/x", BLOCK), ("exp_avg/x", 2 * BLOCK)):
        for first, last in ranges(per_block):
            found = file.read(records[name], LENGTH, first, last - first)
            assert np.array_equal(found.float().numpy(), values[name][first:last]), (name, first, last)
        file.verify(records[name], LENGTH)


def test_one_flipped_bit_is_found_by_who_reads_its_block_and_others_read_on(large, tmp_path):
    path, header, records, values = large
    size, record = path.stat().st_size, records["fp32/x"]
    file = SliceFile(path, size, header)
    at = record.offset + 4 * (BLOCK + 1000)  # in the second of three blocks
    flip_bit(path, at, 6)
    try:
        has(refusal(file.verify, record, LENGTH), str(path), "has not the SHA-256 with which it was saved")
        file.verify(records["exp_avg/x"], LENGTH)
        for first, count in ((0, BLOCK), (2 * BLOCK, LENGTH - 2 * BLOCK), (BLOCK - 5, 5), (2 * BLOCK, 1)):
            assert np.array_equal(file.read(record, LENGTH, first, count).numpy(), values["fp32/x"][first:][:count])
        for first, count in ((0, BLOCK + 1), (0, LENGTH), (2 * BLOCK - 1, 3), (BLOCK, BLOCK), (BLOCK + 5, 1)):
            with pytest.raises(DamagedError, match="SHA-256"):
                file.read(record, LENGTH, first, count)
    finally:
        flip_bit(path, at, 6)


def test_a_file_whose_header_claims_any_length_is_a_sentence(tmp_path):
    path = tmp_path / "x"
    header, _ = write_tensors(path, small(), METADATA)
    size = path.stat().st_size
    for content, says in ((b"", "has 0 bytes, not the"), (b"\xff" * size, "its header has changed")):
        path.write_bytes(content)
        has(refusal(SliceFile, path, size, header), str(path), says, "use an older checkpoint")


def test_a_file_that_shrinks_while_it_is_open_is_a_sentence_and_no_trace(tmp_path):
    records, file = write(tmp_path / "x", small())
    os.truncate(tmp_path / "x", records["kind/float16"].offset + 3)
    for attempt in (
        lambda: file.read(records["kind/float16"], 39, 0, 39),
        lambda: file.read(records["kind/int8"], 41, 5, 2),
        lambda: file.verify(records["kind/int8"], 41),
    ):
        has(refusal(attempt), "has not the SHA-256")
    assert file.read(records["kind/float32"], 37, 0, 37).tolist() == small()["kind/float32"].tolist()
