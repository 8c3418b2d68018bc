"""The reader of JSON: what it lets through is safe for whoever reads it, everything else is one sentence."""

import json
import os
import random
from pathlib import Path

import torch
from random_documents import changed
from refusals import complaints, has, refusal, sentences
from toy import PRECISION, PRESET, begin, ds_config, write_inputs

from megamoe.config.model import load_preset
from megamoe.config.recipe import read_recipe
from megamoe.config.run import RunConfig
from megamoe.config.run_checks import run_problems
from megamoe.data.tokenizer import load_tokenizer
from megamoe.pretrain import check_run
from megamoe.training.engine import deepspeed_own_problems
from megamoe.utils import json_files
from megamoe.utils.json_files import MAX_DEPTH, read_json

DEEP = 100_000
MALFORMED = {
    "nested objects": ('{"a":' * DEEP + "1" + "}" * DEEP, "deep"),
    "nested lists": ('{"a": ' + "[" * DEEP + "]" * DEEP + "}", "deep"),
    "no UTF-8": (b'{"a": "\xe9"}', "0xe9"),
    "a number of 5,000 digits": ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    "a number beyond floating point": ('{"a": 1e400}', "not finite"),
    "NaN": ('{"a": NaN}', "NaN is not finite"),
    "Infinity": ('{"a": {"b": -Infinity}}', "-Infinity is not finite"),
    "two documents": ("{}{}", "Extra data"),
    "nothing": ("", "not valid JSON"),
    "a mistake in a line": ('{\n "a": 1,\n "b" 2}', "line 3"),
    "null": ("null", "JSON object"),
    "a list": ("[1, 2]", "list"),
    "half a surrogate pair": ('{"\\ud800": 1}', "not valid JSON"),
    "zeros": (bytes(100), "not valid JSON"),
}


def test_a_malformed_file_is_one_short_sentence_as_a_json_and_as_a_tokenizer(tmp_path):
    for number, (content, says) in enumerate(MALFORMED.values()):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        problem = refusal(read_json, path)
        has(problem, str(path), says)
        assert len(problem) < 500
        has(refusal(load_tokenizer, path), str(path), "cannot be read", "give a tokenizer.json")


def test_nesting_is_accepted_up_to_the_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": ' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}")
    assert read_json(path)["a"] is not None
    path.write_text('{"a": ' + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "}")
    has(refusal(read_json, path), f"deeper than {MAX_DEPTH} levels")


def test_a_json_above_the_limit_of_its_size_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("{}")
    with open(path, "r+b") as file:
        file.truncate(json_files.MAX_BYTES + 1)  # a hole: it takes no space
    has(refusal(read_json, path), f"{json_files.MAX_BYTES + 1:,} bytes", f"limit of {json_files.MAX_BYTES:,}")
    has(refusal(load_tokenizer, path), "limit")


def test_a_key_given_twice_is_refused_with_both_values_where_they_differ(tmp_path):
    path = tmp_path / "a.json"
    for text in ('{"hidden_size": 64, "hidden_size": 128}', '{"scheduler": {"lr": 64, "lr": 128}}'):
        path.write_text(text)
        has(refusal(read_json, path), str(path), "given twice", "64", "128", "keep one")
    path.write_text('{"hidden_size": 64, "hidden_size": 64}')
    assert read_json(path) == {"hidden_size": 64}


def test_a_json_file_that_is_missing_is_refused(tmp_path):
    has(refusal(read_json, tmp_path / "no.json"), "no.json", "cannot be read", "give the path")


# --- devices and pipes ---


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("/dev/zero")

    def opened(path, *args, **options):
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "read_bytes", opened)
    for path in (tmp_path / "pipe.json", tmp_path / "link.json", tmp_path):
        has(refusal(read_json, path), str(path), "not a regular file", "a JSON file")
        has(refusal(load_tokenizer, path), str(path), "not a regular file", "tokenizer.json")


# --- whatever a file holds, its consumers say what is wrong ---


def garbled(draw, text):
    """The bytes of `text`, now and then with a few that do not belong."""
    data = bytearray(text.encode())
    if draw.random() < 0.15:
        for _ in range(draw.choice((1, 3))):
            data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def random_files(path, document, count, seed):
    """The path, with one changed document after another in it."""
    draw = random.Random(seed)
    for _ in range(count):
        path.write_bytes(garbled(draw, json.dumps(changed(draw, document), ensure_ascii=False)))
        yield path


def some_are_refused(path, document, check, seed, count=100):
    """Whether the check refuses some of the changed documents in sentences, and accepts others."""
    refused = sum(bool(complaints(check, file)) for file in random_files(path, document, count, seed))
    return count / 10 < refused < count


def check_ds(path):
    recipe = read_recipe(str(path), 2, True, "bf16")
    run = RunConfig(ds_config="ds.json", preset="tiny")
    sentences(run_problems(run, load_preset("tiny"), recipe))
    sentences(deepspeed_own_problems(recipe))


def test_any_deepspeed_json_is_accepted_or_refused_in_sentences(tmp_path):
    ds = {
        **ds_config(2, 2),
        "fp16": {"enabled": False, "loss_scale": 128, "hysteresis": 2},
        "flops_profiler": {"enabled": False},
        "communication_data_type": "fp32",
    }
    ds["zero_optimization"]["offload_optimizer"] = {"device": "none"}
    assert some_are_refused(tmp_path / "ds.json", ds, check_ds, seed=1, count=300)


def test_any_preset_is_accepted_or_refused_in_sentences(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 2.0}
    preset = {**PRESET, "rope_theta": 1e4, "rope_scaling": scaling, "router_score": "softmax"}
    assert some_are_refused(tmp_path / "a.json", preset, lambda path: load_preset(str(path)), seed=2, count=200)


def test_any_run_json_is_accepted_or_refused_in_sentences(tmp_path):
    run = RunConfig(**write_inputs(tmp_path, ds_config(2)), run_dir=str(tmp_path / "run"), auto_resume=True)
    cpu = torch.device("cpu")
    begin(check_run(run.model_copy(update={"auto_resume": False}), 1, cpu, PRECISION))
    path = tmp_path / "run" / "run.json"
    assert some_are_refused(path, read_json(path), lambda _: check_run(run, 1, cpu, PRECISION), seed=3, count=60)
