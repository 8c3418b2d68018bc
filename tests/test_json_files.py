"""The reader of JSON: what it lets through is safe for whoever reads it, everything else is one sentence."""

import json
import os
import sys
from pathlib import Path

import plan
import pytest
from refusals import has, refusal
from toy import SHIPPED

from megamoe import cli, json_files
from megamoe.data.tokenizer import load_tokenizer
from megamoe.json_files import MAX_DEPTH, check_regular, read_json

DEEP = 100_000
MALFORMED = {
    "nested objects": ('{"a":' * DEEP + "1" + "}" * DEEP, "deep"),
    "nested lists": ('{"a": ' + "[" * DEEP + "]" * DEEP + "}", "deep"),
    "half a surrogate pair": (r'{"a": ["x\ud800"]}', "surrogate"),
    "half a surrogate pair in a key": (r'{"\udc00": 1}', "surrogate"),
    "no UTF-8": (b'{"a": "\xe9"}', "0xe9"),
    "a number of 5,000 digits": ('{"a": ' + "9" * 5000 + "}", "64 bits"),
    "a number of 65 bits": ('{"a": -18446744073709551616}', "64 bits"),
    "a number beyond floating point": ('{"a": 1e400}', "not finite"),
    "NaN": ('{"a": NaN}', "NaN is not finite"),
    "Infinity": ('{"a": {"b": -Infinity}}', "-Infinity is not finite"),
    "an end too early": ('{"a": 1', "line 1"),
    "two documents": ("{}{}", "Extra data"),
    "nothing": ("", "not valid JSON"),
    "null": ("null", "JSON object"),
    "a text": ('"a"', "JSON object"),
    "a control character": ('{"a": "\n"}', "control character"),
    "zeros": (bytes(100), "not valid JSON"),
}


@pytest.fixture(params=MALFORMED)
def malformed(request, tmp_path):
    """A malformed file, and what the sentence about it must say."""
    content, says = MALFORMED[request.param]
    path = tmp_path / "broken.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path, says


def test_a_malformed_json_is_one_short_sentence(malformed):
    path, says = malformed
    problem = refusal(read_json, path)
    has(problem, str(path), says)
    assert len(problem) < 500


def test_a_malformed_tokenizer_is_one_sentence(malformed):
    has(refusal(load_tokenizer, malformed[0]), str(malformed[0]), "cannot be read", "give a tokenizer.json")


def test_nesting_is_accepted_up_to_the_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": ' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}")
    assert read_json(path)["a"] is not None
    path.write_text('{"a": ' + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "}")
    has(refusal(read_json, path), f"deeper than {MAX_DEPTH} levels")


def test_ordinary_documents_come_back_as_they_are(tmp_path):
    path = tmp_path / "a.json"
    value = {"a": [1, -2.5, 1e-300, True, None, "é😀\n"], "b": {"c": 2**63 - 1, "d": {}}}
    for ascii_only in (True, False):
        path.write_text(json.dumps(value, ensure_ascii=ascii_only), encoding="utf-8")
        assert read_json(path) == value


def test_a_json_above_the_limit_of_its_size_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("{}")
    with open(path, "r+b") as file:
        file.truncate(json_files.MAX_BYTES + 1)  # a hole: it takes no space
    has(refusal(read_json, path), f"{json_files.MAX_BYTES + 1:,} bytes", f"limit of {json_files.MAX_BYTES:,}")
    has(refusal(load_tokenizer, path), "limit")


def test_a_key_given_twice_with_different_values_is_refused_with_both(tmp_path):
    path = tmp_path / "a.json"
    for text in ('{"hidden_size": 64, "hidden_size": 128}', '{"scheduler": {"lr": 64, "lr": 128}}'):
        path.write_text(text)
        has(refusal(read_json, path), str(path), "given twice", "64", "128", "keep one")


def test_a_key_given_twice_with_the_same_value_is_fine(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"hidden_size": 64, "hidden_size": 64}')
    assert read_json(path) == {"hidden_size": 64}


def test_broken_json_is_refused_with_the_place(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n "a": 1,\n "b" 2}')
    has(refusal(read_json, path), str(path), "line 3", "fix")


def test_a_json_file_that_is_missing_undecodable_or_no_object_is_refused(tmp_path):
    has(refusal(read_json, tmp_path / "no.json"), "no.json", "cannot be read", "give the path")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    has(refusal(read_json, tmp_path / "latin.json"), "latin.json", "0xe9")
    (tmp_path / "list.json").write_text("[1, 2]")
    has(refusal(read_json, tmp_path / "list.json"), "list.json", "list", "object")


# --- devices and pipes ---


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("/dev/zero")
    (tmp_path / "kernel.json").symlink_to("/proc/kmsg")

    def opened(path, *args, **options):
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "read_bytes", opened)
    for path in (tmp_path / "pipe.json", tmp_path / "link.json", tmp_path / "kernel.json", Path("/proc/kmsg")):
        has(refusal(read_json, path), str(path), "not a regular file", "a JSON file")
        has(refusal(load_tokenizer, path), str(path), "not a regular file", "tokenizer.json")
    has(refusal(read_json, tmp_path), str(tmp_path), "is a folder")


def test_a_file_that_a_process_has_open_is_regular(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with open(tmp_path / "a.json") as file:
        assert check_regular(Path(f"/proc/self/fd/{file.fileno()}"), "a JSON file") == 2


def test_a_preset_that_is_a_pipe_ends_the_planner_with_2(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe.json")
    words = ["--gpus", "8", "--ds_config", str(SHIPPED / "zero2.json"), "--preset", str(tmp_path / "pipe.json")]
    monkeypatch.setattr(sys, "argv", ["plan.py", *words])
    with pytest.raises(SystemExit) as caught:
        cli.run(plan.main)
    assert caught.value.code == 2
    has(capsys.readouterr().err, "error: ", "pipe.json", "not a regular file")
