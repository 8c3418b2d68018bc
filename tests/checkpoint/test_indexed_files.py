"""Reading a checkpoint by its index: the ranges that are asked for, from the files that hold them, verified."""

import math

import torch
from indexed import BIAS, KINDS, SHAPES, values, write

from megamoe.checkpoint.indexed_files import IndexedFiles


def test_any_range_of_any_kind_is_joined_from_the_ranks_that_hold_it(tmp_path):
    source = IndexedFiles(tmp_path / "step_3", write(tmp_path / "step_3"))
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
