"""The index: complete or none, of its own folder, and without contradictions."""

import json
import math
import random
import shutil
from unittest.mock import Mock

import pytest
from indexed import KINDS, rewrite_index, write
from random_documents import changed
from refusals import complaints, has, refusal, refusals

from megamoe.checkpoint import folders, verify
from megamoe.checkpoint.index import read_index, share_of, write_index
from megamoe.checkpoint.opening import open_source, run_record
from megamoe.utils import disk
from megamoe.utils.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    checkpoint = tmp_path_factory.mktemp("saved") / "step_3"
    return checkpoint, write(checkpoint)


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "step_3")


def test_an_index_that_exists_is_not_overwritten(checkpoint, saved):
    with pytest.raises(FileExistsError):
        write_index(checkpoint, saved[1])
    assert read_index(checkpoint) == saved[1]


def test_an_index_of_which_a_part_is_written_or_something_else_is_none(checkpoint):
    path = checkpoint / "index.json"
    whole = path.read_bytes()
    parts = [whole[:length] for length in [*range(0, len(whole) - 2, 397), len(whole) - 2]]
    others = [b"[]", b"null", b'{"index": 1}', b'{"index": {}, "sha256": 1}', b"\xff", b"1" * 9999]
    for content in parts + others:
        path.write_bytes(content)
        has(refusal(read_index, checkpoint), str(path))
    path.write_bytes(whole[:-1])  # without the line break at its end
    read_index(checkpoint)


def test_an_index_of_a_later_version_says_what_to_do(checkpoint):
    rewrite_index(checkpoint, lambda body: {**body, "version": 3, "more": 1})
    has(refusal(read_index, checkpoint), "has version 3", "reads 2", "use a newer megamoe")


def first_slice(body):
    return body["files"]["rank_00000.safetensors"]["slices"][0]


def put(target, key, value):
    """A change of an index: `target` finds where in it."""

    def change(body):
        target(body)[key] = value

    return change


def tensor(body):
    return first_slice(body)["tensors"]["fp32"]


CONTRADICTIONS = {
    "no file": (lambda body: body["files"].pop("rank_00001.safetensors"), "does not list all values"),
    "overlap": (put(first_slice, "start", 1), "does not list all values of the fp32 of model.a.weight"),
    "no moment": (lambda body: first_slice(body)["tensors"].pop("exp_avg"), "exp_avg of model.a.weight"),
    "no shape": (lambda body: body["shapes"].pop("model.a.weight"), "cannot hold model.a.weight"),
    "beyond the file": (put(tensor, "offset", 2**40), "cannot hold model.a.weight"),
    "too few hashes": (put(tensor, "sha256", []), "has not the SHA-256"),
    "a type of torch that is none of ours": (put(tensor, "dtype", "complex64"), ".fp32.dtype'"),
    "out of the folder": (lambda body: body["files"].update({"../x.py": {"bytes": 1}}), "'files.../x.py"),
    "a parameter with slashes": (lambda body: body["shapes"].update({"../../x": [0]}), "'shapes.../../x"),
    "a state with slashes": (put(lambda body: body["optimizer"], "state", ["../x"]), "'optimizer.state.0'"),
    "a step without end": (put(lambda body: body["optimizer"], "step", 1e400), "Infinity is not finite"),
    "no hash of a header": (lambda body: body["files"]["rank_00000.safetensors"].pop("header"), "header has changed"),
}


def test_an_index_that_contradicts_itself_is_refused_with_what_it_says(checkpoint):
    path = checkpoint / "index.json"
    original = path.read_bytes()
    for what, (change, says) in CONTRADICTIONS.items():
        rewrite_index(checkpoint, lambda body, change=change: change(body) and None)
        problems = refusals(use_all, checkpoint)
        assert len(problems) <= 3, what
        assert says in problems[0], (what, problems)
        path.write_bytes(original)


def use_all(checkpoint):
    """Everything that is read of a checkpoint, on the way of a resume and of the tools."""
    problems = verify.problems(checkpoint)
    if problems:
        raise UserError(*problems)
    source = open_source(checkpoint)
    for name, shape in source.shapes.items():
        for kind in ("fp32", *source.state_names):
            assert source.read(name, kind, 0, math.prod(shape)).view(shape).numel() == math.prod(shape)
    source.training_state()
    run_record(checkpoint)


def test_a_malformed_index_is_refused_in_sentences_whatever_is_wrong_with_it(checkpoint):
    draw = random.Random(0)
    original = (checkpoint / "index.json").read_bytes()
    refused = 0
    for _ in range(500):
        rewrite_index(checkpoint, lambda _: {**changed(draw, json.loads(original)["index"]), "version": 2})
        refused += bool(complaints(use_all, checkpoint))
    assert 300 < refused < 500  # some changes, as of the run's record, are none of its business


def test_an_index_whose_flush_fails_is_none(tmp_path, saved, monkeypatch):
    (tmp_path / "step_3").mkdir()
    monkeypatch.setattr(disk, "flush", Mock(side_effect=[None, None, OSError(5, "Input/output error")]))
    with pytest.raises(OSError, match="Input/output error"):
        write_index(tmp_path / "step_3", saved[1])
    assert not folders.is_complete(tmp_path / "step_3")


def test_a_number_that_no_reader_takes_is_not_written(tmp_path, saved):
    (tmp_path / "step_3").mkdir()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_index(tmp_path / "step_3", saved[1].model_copy(update={"run": {"rate": float("nan")}}))
    assert list((tmp_path / "step_3").iterdir()) == []


def test_the_shares_have_every_tensor_of_the_kinds_once_and_no_file_without_one(saved):
    files = saved[1].files
    for kinds in (KINDS[1:], ["fp32", "buffer"], [], None):
        shares = [share_of(files, part, 3, kinds) for part in range(3)]
        found, expected = (
            sorted(
                (file, piece.name, kind)
                for share in some
                for file, record in share.items()
                for piece in record.slices
                for kind in piece.tensors
                if kinds is None or kind in kinds
            )
            for some in (shares, [files])
        )
        assert found == expected
        assert sum("zero_to_fp32.py" in share for share in shares) == 1
        assert all(record.slices or file == "zero_to_fp32.py" for share in shares for file, record in share.items())
