"""Reading a checkpoint by its index: the ranges that are asked for, from the files that hold them, verified."""

import math
import os

import pytest
import torch
from indexed import BIAS, KINDS, SHAPES, flip_bit, values, write
from refusals import has, refusal

from megamoe.checkpoint import indexed_files, verify
from megamoe.checkpoint.index import read_index
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.checkpoint.slice_file import SliceFile

FIRST, SECOND = "rank_00000.safetensors", "rank_00001.safetensors"


@pytest.fixture
def checkpoint(tmp_path):
    write(tmp_path / "step_3")
    return tmp_path / "step_3"


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that are opened, in order."""
    names, real = [], SliceFile.__init__

    def init(self, path, *args):
        names.append(path.name)
        real(self, path, *args)

    monkeypatch.setattr(SliceFile, "__init__", init)
    return names


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


def test_what_it_says_of_training_is_what_the_index_says(checkpoint):
    state = source_of(checkpoint).training_state()
    step = state.pop("optimizer_step")
    assert (step.dtype, step.item()) == (torch.float32, 2)
    assert state == {
        "global_steps": 3, "global_samples": 8, "skipped_steps": 1, "groups": [{"lr": 0.1}],
        "lr_scheduler": {"last_epoch": 2, "_step_count": 3}, "loss_scaler": {"cur_scale": 1.0, "dynamic": False},
    }  # fmt: skip


def test_a_file_is_opened_only_for_what_it_holds_and_once_unless_there_are_very_many(checkpoint, opened, monkeypatch):
    source = source_of(checkpoint)
    assert opened == [FIRST]  # for the router statistics
    source.read("model.a.weight", "fp32", 0, 23)
    source.read("model.a.weight", "exp_avg", 3, 7)
    assert opened == [FIRST]
    source.read("model.a.weight", "fp32", 22, 2)
    source.read("model.a.weight", "exp_avg", 23, 12)
    assert opened == [FIRST, SECOND]
    monkeypatch.setattr(indexed_files, "OPEN_FILES", 1)
    opened.clear()
    source = source_of(checkpoint)
    for _ in range(2):
        source.read("model.a.weight", "fp32", 0, 35)
    assert opened == [FIRST, SECOND, FIRST, SECOND]


def test_a_reader_needs_no_other_block_or_file_than_those_of_its_values(checkpoint):
    piece = read_index(checkpoint).files[FIRST].slices[0]
    assert piece.name == "model.a.weight"
    flip_bit(checkpoint / FIRST, piece.tensors["exp_avg"].offset + 5)
    (checkpoint / SECOND).unlink()
    source = source_of(checkpoint)
    assert torch.equal(source.read("model.a.weight", "fp32", 0, 23), values("model.a.weight", "fp32")[:23])
    has(refusal(source.read, "model.a.weight", "exp_avg", 0, 1), str(checkpoint / FIRST), "SHA-256")
    has(refusal(source.read, "model.a.weight", "fp32", 22, 2), str(checkpoint / SECOND), "is missing")


def test_the_shares_of_a_verification_read_every_byte_once(checkpoint, monkeypatch):
    read, real = [], os.preadv

    def preadv(descriptor, buffers, offset):
        count = real(descriptor, buffers, offset)
        read.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), offset, count))
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    for part in range(5):
        assert verify.problems(checkpoint, part, 5) == []
    assert len(set(read)) == len(read)
    files = read_index(checkpoint).files.values()
    tensors = [(one, piece.count) for file in files for piece in file.slices for one in piece.tensors.values()]
    assert sum(count for _, _, count in read) == sum(count * tensor.itemsize for tensor, count in tensors)
