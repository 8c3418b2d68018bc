"""The manifest of a checkpoint in one of DeepSpeed's layouts: size and SHA-256 of each file."""

import hashlib
import json
import os
import shutil

from refusals import has, only, refusal, sentences

from megamoe.checkpoint import manifest

FILES = ("a.pt", "zero/b.pt", "run.json")


def write(checkpoint, step=5, content=b"weights", **about):
    """A checkpoint of three files, with its manifest."""
    for name in FILES:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content + name.encode())
    records = {name: manifest.file_record(checkpoint / name) for name in FILES}
    manifest.seal(checkpoint, {"step": step, **about}, records)
    return checkpoint


def problems(checkpoint, *share):
    return sentences(manifest.file_problems(checkpoint, manifest.read_manifest(checkpoint), *share))


def test_a_manifest_has_size_and_sha256_of_every_file(tmp_path):
    assert manifest.read_manifest(tmp_path) is None
    checkpoint = write(tmp_path / "step_5", layout="universal")
    record = json.loads((checkpoint / "manifest.json").read_text())
    assert (record["step"], record["layout"]) == (5, "universal")
    assert record["files"].keys() == set(FILES)
    for name in FILES:
        data = (checkpoint / name).read_bytes()
        assert record["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert problems(checkpoint) == []


def test_a_file_of_many_blocks_is_hashed_whole(tmp_path):
    data = os.urandom(3 * manifest.READ_BYTES + 5)
    (tmp_path / "x").write_bytes(data)
    assert manifest.file_record(tmp_path / "x") == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_damage_is_one_sentence_with_the_file(tmp_path):
    checkpoint = write(tmp_path / "step_5")
    path = checkpoint / "a.pt"
    for damage, says in (
        (lambda: path.write_bytes(b"Xeightsa.pt"), "SHA-256"),
        (lambda: os.truncate(path, 3), "has 3 bytes, not the 11"),
        (path.unlink, "is missing"),
        (path.mkdir, "is missing"),
    ):
        damage()
        has(only(problems(checkpoint)), str(path), says, "older checkpoint")


def test_the_shares_of_a_verification_cover_every_file_once(tmp_path):
    checkpoint = write(tmp_path / "step_5")
    for name in FILES:
        (checkpoint / name).write_bytes(b"damaged")
    found = [problems(checkpoint, part, 4) for part in range(4)]
    assert sorted(len(one) for one in found) == [0, 1, 1, 1]
    assert sorted(problem for one in found for problem in one) == sorted(problems(checkpoint))


def test_a_manifest_under_the_name_of_another_step_is_refused(tmp_path):
    checkpoint = write(tmp_path / "step_5")
    assert manifest.read_manifest(checkpoint.rename(tmp_path / "anything"))["step"] == 5
    shutil.copytree(tmp_path / "anything", tmp_path / "step_6")
    has(refusal(manifest.read_manifest, tmp_path / "step_6"), "is of step 5", "step_6", "older checkpoint")


def test_a_manifest_without_sizes_or_digests_is_refused(tmp_path):
    for text in ('{"files": 1}', '{"files": {"a.pt": {"bytes": 1}}}', '{"files": {"a.pt": 1}}', "{}",
                 '{"files": {"a.pt": {"bytes": "1", "sha256": "x"}}}'):  # fmt: skip
        (tmp_path / "manifest.json").write_text(text)
        has(refusal(manifest.read_manifest, tmp_path), "bytes and sha256")


def test_a_file_that_the_disk_cannot_give_is_a_problem_and_no_trace(tmp_path, monkeypatch):
    checkpoint = write(tmp_path / "step_5")
    monkeypatch.setattr(manifest, "file_sha256", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    found = problems(checkpoint)
    assert len(found) == 3
    assert all("cannot be read (Input/output error)" in problem for problem in found)
