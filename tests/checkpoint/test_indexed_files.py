"""Reading a checkpoint by its index: the ranges that are asked for, from the files that hold them, verified."""

import math
import os
import shutil

import pytest
import torch
from indexed import BIAS, KINDS, SHAPES, flip_bit, values, write
from refusals import has, only, refusal, sentences

from megamoe.checkpoint import indexed_files
from megamoe.checkpoint.index import Range, read_index
from megamoe.checkpoint.indexed_files import IndexedFiles, problems
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


def test_a_file_is_opened_only_for_what_it_holds_and_once(checkpoint, opened):
    source = source_of(checkpoint)
    assert opened == [FIRST]  # for the router statistics
    source.read("model.a.weight", "fp32", 0, 23)
    source.read("model.a.weight", "exp_avg", 3, 7)
    assert opened == [FIRST]
    source.read("model.a.weight", "fp32", 22, 2)
    source.read("model.a.weight", "exp_avg", 23, 12)
    assert opened == [FIRST, SECOND]


def test_with_very_many_files_few_are_open_at_a_time(checkpoint, opened, monkeypatch):
    monkeypatch.setattr(indexed_files, "OPEN_FILES", 1)
    source = source_of(checkpoint)
    for _ in range(2):
        source.read("model.a.weight", "fp32", 0, 35)
    assert opened == [FIRST, SECOND, FIRST, SECOND]


def test_a_reader_of_other_blocks_reads_on_beside_a_flipped_bit(checkpoint):
    index = read_index(checkpoint)
    piece = index.files[FIRST].slices[0]
    assert piece.name == "model.a.weight"
    flip_bit(checkpoint / FIRST, piece.tensors["exp_avg"].offset + 5)
    source = source_of(checkpoint)
    assert torch.equal(source.read("model.a.weight", "fp32", 0, 35), values("model.a.weight", "fp32"))
    assert torch.equal(source.read("model.a.weight", "exp_avg", 23, 12), values("model.a.weight", "exp_avg")[23:])
    has(refusal(source.read, "model.a.weight", "exp_avg", 0, 1), str(checkpoint / FIRST), "SHA-256")


def test_a_reader_of_a_part_needs_no_file_of_the_others(checkpoint):
    (part,) = read_index(checkpoint).parts([[Range("model.b.weight", 0, 7)]])
    (checkpoint / SECOND).unlink()
    source = IndexedFiles(checkpoint, part)
    assert torch.equal(source.read("model.b.weight", "exp_avg_sq", 0, 7), values("model.b.weight", "exp_avg_sq")[:7])


# --- every byte -----------------------------------------------------------------------------------------------------


def test_any_flipped_bit_of_any_file_is_found_and_the_file_named(checkpoint):
    index = read_index(checkpoint)
    assert problems(checkpoint, index) == []
    for path in (checkpoint / FIRST, checkpoint / SECOND, checkpoint / "zero_to_fp32.py"):
        for byte in range(0, path.stat().st_size, 11):
            flip_bit(path, byte, byte % 8)
            assert all(str(path) in problem for problem in sentences(problems(checkpoint, index)))
            assert problems(checkpoint, index), (path, byte)
            flip_bit(path, byte, byte % 8)
    assert problems(checkpoint, index) == []


def test_a_file_that_is_missing_cut_off_or_of_another_save_of_the_same_step_is_named(checkpoint, tmp_path):
    write(tmp_path / "other" / "step_3", seed=1)
    path = checkpoint / SECOND
    for damage, says in (
        (lambda: shutil.copyfile(tmp_path / "other" / "step_3" / SECOND, path), "of another save"),
        (lambda: os.truncate(path, 1000), "has 1,000 bytes, not the"),
        (path.unlink, "is missing"),
    ):
        damage()
        has(only(sentences(problems(checkpoint, read_index(checkpoint)))), str(path), says)


def test_files_of_two_ranks_that_are_exchanged_are_named(checkpoint):
    shutil.copyfile(checkpoint / FIRST, checkpoint / "one")
    shutil.copyfile(checkpoint / SECOND, checkpoint / FIRST)
    (checkpoint / "one").rename(checkpoint / SECOND)
    found = sentences(problems(checkpoint, read_index(checkpoint)))
    assert {name for name in (FIRST, SECOND) for problem in found if name in problem} == {FIRST, SECOND}


def test_a_script_that_is_not_the_one_that_was_saved_is_named(checkpoint):
    path = checkpoint / "zero_to_fp32.py"
    for damage in (lambda: path.write_text("print('other')"), path.unlink):
        damage()
        has(only(sentences(problems(checkpoint, read_index(checkpoint)))), str(path), "older checkpoint")


def test_the_shares_of_a_verification_read_every_byte_once(checkpoint, monkeypatch):
    read, real = [], os.preadv

    def preadv(descriptor, buffers, offset):
        count = real(descriptor, buffers, offset)
        read.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), offset, count))
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    index = read_index(checkpoint)
    for part in range(5):
        assert problems(checkpoint, index, part, 5) == []
    assert len(set(read)) == len(read)
    tensors = [
        (one, piece.count) for file in index.files.values() for piece in file.slices for one in piece.tensors.values()
    ]
    assert sum(count for _, _, count in read) == sum(count * tensor.itemsize for tensor, count in tensors)
    for name in (FIRST, SECOND, "zero_to_fp32.py"):
        flip_bit(checkpoint / name, 14, 3)
    found = [problem for part in range(5) for problem in problems(checkpoint, index, part, 5)]
    assert {name for name in (FIRST, SECOND, "zero_to_fp32.py") for problem in found if name in problem} == {
        FIRST, SECOND, "zero_to_fp32.py",
    }  # fmt: skip
