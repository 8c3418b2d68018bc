"""Weights under plain names in files of any form."""

import json
import os

import pytest
import torch
from engines import plain_state
from exported import random_source
from indexed import Malicious
from refusals import has, refusal
from safetensors.torch import save_file
from toy import PRESET

from megamoe.checkpoint.opening import open_source
from megamoe.config.model import ModelConfig
from megamoe.formats.plain_files import PlainFiles
from megamoe.formats.source import load_weights
from megamoe.formats.source_checks import model_problems
from megamoe.model.decoder import Decoder
from megamoe.model.names import is_buffer

CONFIG = ModelConfig(**PRESET)


@pytest.fixture(scope="module")
def state():
    source = random_source(CONFIG)
    return source.tensors | source.buffers


def write_index(folder, state):
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_plain_weights_of_every_form_load_in_the_dtype_asked_for_and_router_statistics_in_fp32(state, tmp_path):
    folders = [tmp_path / name for name in ("tied", "index", "adapted")]
    for folder in folders:
        folder.mkdir()
        save_file({"base_model.model.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    torch.save(state, tmp_path / "w.pt")
    save_file(state, tmp_path / "w.safetensors")
    torch.save({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, folders[0] / "pytorch_model.bin")
    write_index(folders[1], state)
    save_file(state, folders[2] / "model.safetensors")
    (folders[1] / "adapter_model.safetensors.index.json").write_text("{}")
    for path in (tmp_path / "w.pt", tmp_path / "w.safetensors", *folders):
        source, model = open_source(path), Decoder(CONFIG)
        assert isinstance(source, PlainFiles)
        assert model_problems(source, CONFIG, "it") == []
        for dtype in (torch.float32, torch.bfloat16):
            load_weights(model, source, dtype)
            loaded = plain_state(model)
            for name, tensor in state.items():
                expected = tensor if is_buffer(name) else tensor.to(dtype)
                assert loaded[name].dtype == expected.dtype, (path, name)
                assert torch.equal(loaded[name], expected), (path, name)


def test_a_file_that_is_torn_or_no_dict_of_tensors_is_one_sentence_and_runs_no_code(state, tmp_path):
    torch.save({"epoch": 3}, tmp_path / "weights.pt")
    has(refusal(open_source, tmp_path / "weights.pt"), "no state_dict")
    torch.save({"x": Malicious(tmp_path / "mark")}, tmp_path / "weights.pt")
    has(refusal(open_source, tmp_path / "weights.pt"), "weights.pt", "system", "do not open it")
    assert not (tmp_path / "mark").exists()
    save_file(state, tmp_path / "w.safetensors")
    os.truncate(tmp_path / "w.safetensors", 1000)
    has(refusal(open_source, tmp_path / "w.safetensors"), "w.safetensors", "cannot be read")


def test_an_index_without_a_map_is_one_sentence(state, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_index(folder, state)
    for index in ({}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        has(refusal(open_source, folder), "has no weight_map")
