"""Reading a checkpoint by its index: the ranges that are asked for, from the files that hold them, verified."""

import math

import pytest
import torch
from indexed import BIAS, KINDS, SHAPES, values, write

from megamoe.checkpoint.index import read_index
from megamoe.checkpoint.indexed_files import IndexedFiles

FIRST, SECOND = "rank_00000.safetensors", "rank_00001.safetensors"


@pytest.fixture
def checkpoint(tmp_path):
    write(tmp_path / "step_3")
    return tmp_path / "step_3"


def source_of(checkpoint):
    return IndexedFiles(checkpoint, read_index(checkpoint))


def test_any_range_of_any_kind_is_joined_from_the_ranks_that_hold_it(checkpoint):
    source = source_of(checkpoint)
    assert source.shapes == SHAPES
    assert source.state_names == KINDS[1:]
    assert torch.equal(source.buffers[BIAS], values(BIAS, "buffer"))
    for name, shape in SHAPES.items():
        count = math.prod(shape)
        for kind in KINDS:
            whole = values(name, kind)
            for start in range(count + 1):
                for end in range(start, count + 1):
                    found = source.read(name, kind, start, end - start)
                    assert found.dtype == torch.float32
                    assert torch.equal(found, whole[start:end]), (name, kind, start, end)
