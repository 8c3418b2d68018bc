"""Checkpoint folders are complete or absent, whatever happens and whenever."""

import builtins
import errno
import hashlib
import json
import os
import random
import shutil

import pytest
from refusals import only, sentences

from megamoe.checkpoint import manifest
from megamoe.errors import UserError


def write(folder, step, content=b"weights", **about):
    """Save a checkpoint of two files and a run.json."""
    checkpoint = folder / f"step_{step}"
    partial = manifest.partial_of(checkpoint)
    partial.mkdir(parents=True)
    files = {
        name: manifest.write_file(partial / name, content + name.encode()) for name in ("a.pt", "b.pt", "run.json")
    }
    manifest.commit(checkpoint, {"step": step, **about}, files)
    return checkpoint


def names(paths):
    return [path.name for path in paths]


def holding(folder):
    """Name of the checkpoint that a start would use."""
    return next((path.name for path in manifest.candidates(folder) if not manifest.problems(path)), None)


def test_a_manifest_has_size_and_sha256_of_every_file(tmp_path):
    checkpoint = write(tmp_path, 5, world_size=2)
    record = json.loads((checkpoint / "manifest.json").read_text())
    assert record["step"] == 5
    assert record["world_size"] == 2
    for name in ("a.pt", "b.pt"):
        data = (checkpoint / name).read_bytes()
        assert record["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert (tmp_path / "latest").read_text() == "step_5"
    assert manifest.problems(checkpoint) == []


def test_a_file_is_hashed_as_it_is_written_in_pieces_of_any_size_and_the_source_may_change_after(tmp_path):
    draw = random.Random(0)
    file, whole = manifest.HashedFile(tmp_path / "x"), b""
    buffer = bytearray(300_000)
    for _ in range(20):
        count = draw.randrange(len(buffer))
        buffer[:count] = draw.randbytes(count)
        file.write(memoryview(buffer)[:count])
        whole += bytes(buffer[:count])
    record = file.close()
    assert (tmp_path / "x").read_bytes() == whole
    assert record == {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}


def test_only_a_plain_number_makes_a_checkpoints_name(tmp_path):
    write(tmp_path, 0)
    for name in ("step_007", "step_3.old.partial", "step_", "step_x", "xstep_1"):
        (tmp_path / name).mkdir()
    assert names(manifest.checkpoints(tmp_path)) == ["step_0"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: os.truncate(path, 3), "has 3 bytes, not the 11"),
        (lambda path: path.write_bytes(b"Xeightsb.pt"), "SHA-256"),
        (lambda path: (path.parent / "manifest.json").write_text('{"files": 1}'), "does not list its files"),
        (lambda path: (path.parent / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda path: shutil.rmtree(path.parent), "does not exist"),
    ],
)
def test_damage_is_one_sentence_and_the_newest_checkpoint_that_holds_is_used(tmp_path, damage, says):
    for step in (10, 9, 20):
        write(tmp_path, step)
    damage(tmp_path / "step_20" / "b.pt")
    assert says in only(sentences(manifest.problems(tmp_path / "step_20")))
    assert names(manifest.candidates(tmp_path)) == ["step_20", "step_10", "step_9"]
    assert holding(tmp_path) == "step_10"


def test_the_shares_of_a_verification_cover_every_file_once(tmp_path):
    checkpoint = write(tmp_path, 1)
    for name in ("a.pt", "b.pt"):
        (checkpoint / name).write_bytes(b"damaged")
    found = [manifest.problems(checkpoint, part, 4) for part in range(4)]
    assert sorted(len(one) for one in found) == [0, 0, 1, 1]
    assert sorted(problem for one in found for problem in one) == sorted(manifest.problems(checkpoint))


def test_a_run_that_went_back_tries_what_it_left_behind_last(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "latest").write_text("step_2")
    assert names(manifest.candidates(tmp_path)) == ["step_2", "step_1", "step_4", "step_3"]
    write(tmp_path, 3, b"again")  # its own step 3
    assert (tmp_path / "step_3" / "a.pt").read_bytes() == b"againa.pt"
    assert holding(tmp_path) == "step_3"


def test_without_latest_the_newest_that_holds_is_used(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "latest").unlink()
    assert holding(tmp_path) == "step_2"
    assert manifest.candidates(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(0, 0, [1, 2, 3, 4, 5, 6]), (2, 0, [5, 6]), (2, 3, [3, 5, 6]), (1, 2, [2, 4, 6]), (9, 1, [1, 2, 3, 4, 5, 6])],
)
def test_retention_keeps_the_last_ones_and_every_nth(tmp_path, last, every, kept):
    for step in range(1, 7):
        manifest.prune(write(tmp_path, step), last, every)
    assert sorted(map(manifest.step_of, manifest.checkpoints(tmp_path))) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["latest", *(f"step_{step}" for step in kept)])


def test_retention_does_not_count_what_was_passed_over(tmp_path):
    for step in (4, 5):
        write(tmp_path, step)
    manifest.prune(write(tmp_path, 6), 2, 0, ignored={5})
    assert sorted(map(manifest.step_of, manifest.checkpoints(tmp_path))) == [4, 5, 6]


def test_retention_never_removes_what_was_just_saved_nor_what_lies_ahead(tmp_path):
    write(tmp_path, 50)
    manifest.prune(write(tmp_path, 7), 1, 0)
    assert sorted(map(manifest.step_of, manifest.checkpoints(tmp_path))) == [7, 50]


class Killed(BaseException):
    """Stands for SIGKILL: nobody handles it."""


CALLS = ((os, "fsync"), (os, "replace"), (os, "open"), (builtins, "open"), (os, "rmdir"), (os, "unlink"))


def interrupt(monkeypatch, at, error):
    """Let the `at`-th call to the file system raise `error`; returns a list that has it once it did."""
    raised, count = [], [0]

    def wrap(real):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == at:
                raised.append(error)
                raise error
            return real(*args, **kwargs)

        return call

    for module, name in CALLS:
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))
    return raised


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["kill", "full"])
def test_an_older_checkpoint_holds_whenever_saving_the_next_is_cut_off(tmp_path, monkeypatch, error):
    moments = 0
    write(tmp_path / "before", 1)
    write(tmp_path / "before", 2)
    for at in range(1, 1000):
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(at))
        with monkeypatch.context() as patch:
            raised = interrupt(patch, at, error)
            try:
                manifest.prune(write(folder, 3), 1, 0)
            except (Killed, OSError):
                assert raised
        if not raised:
            break
        moments += 1
        found = holding(folder)
        assert found in ("step_2", "step_3")
        # Nothing that has a checkpoint's name is less than one.
        assert all(manifest.problems(path) == [] for path in manifest.checkpoints(folder))
        manifest.clean(folder)
        assert not list(folder.glob("*.partial"))
        assert holding(folder) == found
        write(folder, 4)  # and it goes on
        assert holding(folder) == "step_4"
    assert moments > 15


def test_a_folder_that_deepspeed_wrote_itself_has_no_manifest_and_is_taken_as_it_is(tmp_path):
    (tmp_path / "step_3").mkdir()
    assert manifest.read_manifest(tmp_path / "step_3") is None
    assert manifest.problems(tmp_path / "step_3") == []


def test_what_is_found_at_a_path_is_a_runs_checkpoints_a_folder_of_them_or_the_path_itself(tmp_path):
    write(tmp_path / "checkpoints", 1)
    write(tmp_path / "checkpoints", 2)
    for path in (tmp_path, tmp_path / "checkpoints"):
        assert names(manifest.found_at(path)) == ["step_2", "step_1"]
    assert manifest.found_at(tmp_path / "checkpoints" / "step_1") == [tmp_path / "checkpoints" / "step_1"]


def test_a_file_that_the_disk_cannot_give_is_a_problem_and_no_trace(tmp_path, monkeypatch):
    checkpoint = write(tmp_path, 1)
    monkeypatch.setattr(manifest, "sha256", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    found = sentences(manifest.problems(checkpoint))
    assert len(found) == 3
    assert all("cannot be read (Input/output error)" in problem for problem in found)


def test_a_checkpoint_that_lost_its_manifest_is_damaged(tmp_path):
    checkpoint = write(tmp_path, 1)
    (checkpoint / "manifest.json").unlink()
    assert "manifest.json is missing" in only(sentences(manifest.problems(checkpoint)))


def test_a_manifest_without_digests_is_refused(tmp_path):
    checkpoint = write(tmp_path, 1)
    (checkpoint / "manifest.json").write_text('{"files": {"a.pt": {"bytes": 1}}}')
    with pytest.raises(UserError, match="bytes and sha256"):
        manifest.read_manifest(checkpoint)
