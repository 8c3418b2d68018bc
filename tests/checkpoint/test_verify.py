"""One check for every form: is a checkpoint what was saved, and does a folder without index or manifest count?"""

import shutil

import pytest
from form_1 import CHECKPOINT as BEFORE
from indexed import flip_bit, write
from refusals import has, only, sentences

from megamoe.checkpoint import folders, verify


@pytest.fixture(params=["form 2", "form 1"])
def checkpoint(request, tmp_path):
    """One that lies in no run's folder."""
    path = tmp_path / "step_3"
    if request.param == "form 2":
        write(path)
    else:
        shutil.copytree(BEFORE, path)
    return path


def only_problem(checkpoint):
    return only(sentences(verify.problems(checkpoint)))


def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(checkpoint):
    assert verify.problems(checkpoint) == []
    for path in checkpoint.iterdir():
        middle = path.stat().st_size // 2
        flip_bit(path, middle)
        found = sentences(verify.problems(checkpoint))
        assert found
        assert all(str(path) in problem for problem in found) or path.name == "manifest.json"
        flip_bit(path, middle)
    assert verify.problems(checkpoint) == []


def test_a_missing_file_is_found_and_named(checkpoint, tmp_path):
    for path in sorted(checkpoint.iterdir()):
        path.rename(tmp_path / "away")
        found = sentences(verify.problems(checkpoint))
        if path.name in (folders.INDEX, folders.MANIFEST):
            has(only(found), f"{checkpoint} was not saved completely", "older checkpoint")
        else:
            has(only(found), str(path), "is missing")
        (tmp_path / "away").rename(path)


def test_the_shares_of_a_verification_find_what_the_whole_finds(checkpoint):
    for path in checkpoint.iterdir():
        if path.name not in (folders.INDEX, folders.MANIFEST):
            flip_bit(path, path.stat().st_size // 2)
    whole = verify.problems(checkpoint)
    assert len(whole) >= 3
    found = [problem for part in range(3) for problem in verify.problems(checkpoint, part, 3)]
    assert sorted(set(found)) == sorted(whole)


def test_what_lies_under_the_name_of_another_step_is_found(checkpoint):
    for name in ("step_30", "step_2.3"):
        checkpoint = checkpoint.rename(checkpoint.with_name(name))
        has(only_problem(checkpoint), "of step 3, but its folder is called", name)
    assert verify.problems(checkpoint.rename(checkpoint.with_name("step_3.1"))) == []


# --- without index and manifest -------------------------------------------------------------------------------------


def test_a_folder_of_a_run_without_index_or_manifest_was_not_saved_completely(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "mp_rank_00_model_states.pt").write_bytes(b"x")
    assert verify.problems(checkpoint) == []  # as DeepSpeed itself leaves it: nothing to compare with
    (tmp_path / "run" / "run.json").write_text("{}")
    has(only_problem(checkpoint), f"{checkpoint} was not saved completely, for it has no index.json", "older")


def test_a_rank_s_file_alone_was_not_saved_completely_wherever_it_lies(tmp_path):
    has(only_problem(tmp_path / "x"), f"{tmp_path / 'x'} does not exist")
    write(tmp_path / "x")
    (tmp_path / "x" / "index.json").unlink()
    has(only_problem(tmp_path / "x"), "was not saved completely")


def test_what_megamoe_has_not_written_cannot_be_verified_and_is_taken_as_it_is(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "weights.pt"):
        assert verify.problems(path) == []
    (tmp_path / "run.json").write_text("{}")  # a run folder without checkpoints is no incomplete one
    assert verify.problems(tmp_path) == []


def test_a_run_whose_record_is_torn_is_one_sentence(tmp_path):
    write(tmp_path / "run" / "checkpoints" / "step_3")
    (tmp_path / "run" / "run.json").write_text('{"run_id": ')
    has(only_problem(tmp_path / "run" / "checkpoints" / "step_3"), str(tmp_path / "run" / "run.json"), "not valid JSON")


def test_a_manifest_that_is_none_is_one_sentence(tmp_path):
    checkpoint = shutil.copytree(BEFORE, tmp_path / "x")
    for text in ("{", "[]", '{"files": 1}', "[" * 100_000):
        (checkpoint / "manifest.json").write_text(text)
        has(only_problem(checkpoint), str(checkpoint / "manifest.json"))
