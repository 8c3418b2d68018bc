"""One check for every form: is a checkpoint what was saved, and does a folder without index or manifest count?"""

import os
import shutil

import pytest
from indexed import flip_bit, write, write_both
from refusals import has, only, refusal, sentences

from megamoe.checkpoint import folders, verify
from megamoe.checkpoint.opening import find_checkpoint


@pytest.fixture(params=["own", "universal"])
def checkpoint(request, tmp_path):
    """One that lies in no run's folder."""
    return write_both(tmp_path)[request.param]


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def only_problem(checkpoint):
    return only(sentences(verify.problems(checkpoint)))


def test_a_flipped_bit_anywhere_in_any_file_is_found_and_the_file_named(checkpoint):
    assert verify.problems(checkpoint) == []
    for path in files(checkpoint):
        whole = path.read_bytes()
        for byte in range(0, len(whole), 11 if path.suffix == ".safetensors" else 487):
            flip_bit(path, byte, byte % 8)
            found = sentences(verify.problems(checkpoint))
            assert found, (path, byte)
            assert all(str(path) in problem for problem in found) or path.name == folders.MANIFEST
            path.write_bytes(whole)
    assert verify.problems(checkpoint) == []


def test_a_file_that_is_missing_cut_off_or_of_another_save_of_the_same_step_is_named(checkpoint, tmp_path):
    write(tmp_path / "other" / "step_3", seed=1)
    for path in files(checkpoint):
        path.rename(tmp_path / "away")
        found = sentences(verify.problems(checkpoint))
        if path.name in (folders.INDEX, folders.MANIFEST):
            has(only(found), f"{checkpoint} was not saved completely", "older checkpoint")
        else:
            has(only(found), str(path), "is missing")
            shutil.copyfile(tmp_path / "away", path)
            os.truncate(path, path.stat().st_size - 1)
            has(only_problem(checkpoint), str(path), "bytes", "older checkpoint")
        if path.suffix == ".safetensors":
            shutil.copyfile(tmp_path / "other" / "step_3" / path.name, path)
            has(only_problem(checkpoint), str(path), "of another save")
        (tmp_path / "away").replace(path)


def test_what_lies_under_the_name_of_another_step_is_found(checkpoint):
    for name in ("step_30", "step_2.3"):
        checkpoint = checkpoint.rename(checkpoint.with_name(name))
        has(only_problem(checkpoint), "of step 3, but its folder is called", name)
    assert verify.problems(checkpoint.rename(checkpoint.with_name("step_3.1"))) == []


def test_a_folder_without_index_or_manifest_was_not_saved_completely_if_megamoe_has_written_it(tmp_path):
    has(only_problem(tmp_path / "x"), f"{tmp_path / 'x'} does not exist")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "mp_rank_00_model_states.pt").write_bytes(b"x")
    (tmp_path / "weights.pt").write_bytes(b"x")
    for path in (checkpoint, tmp_path, tmp_path / "weights.pt"):
        assert verify.problems(path) == []  # nothing to compare with
    (tmp_path / "run" / "run.json").write_text("{}")
    has(only_problem(checkpoint), f"{checkpoint} was not saved completely, for it has no index.json", "older")
    assert verify.problems(tmp_path / "run") == []  # a run folder is no checkpoint
    write(tmp_path / "alone")
    (tmp_path / "alone" / "index.json").unlink()
    has(only_problem(tmp_path / "alone"), "was not saved completely")
    has(refusal(find_checkpoint, tmp_path / "alone"), "was not saved completely")


def test_a_torn_record_of_the_run_is_one_sentence(tmp_path):
    write(tmp_path / "run" / "checkpoints" / "step_3")
    (tmp_path / "run" / "run.json").write_text('{"run_id": ')
    has(only_problem(tmp_path / "run" / "checkpoints" / "step_3"), str(tmp_path / "run" / "run.json"), "not valid JSON")


def test_a_malformed_manifest_is_one_sentence(tmp_path):
    checkpoint = write_both(tmp_path)["universal"]
    record = '{"step": 3, "layout": "universal", "files": %s}'
    for text in (
        "{",
        "[]",
        "{}",
        record % "1",
        record % '{"a.pt": {"sha256": "x"}}',
        record.replace("3", '"x"') % "{}",
    ):
        (checkpoint / "manifest.json").write_text(text)
        has(only_problem(checkpoint), str(checkpoint / "manifest.json"))
