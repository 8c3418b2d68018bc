"""Directories of transformers' classes: read in any form, in ranges, and refused in a sentence."""

import json
import math

import native_models
import pytest
import torch
from indexed import Malicious
from refusals import has, refusal
from safetensors.torch import load_file, save_file

from megamoe.checkpoint.opening import open_source
from megamoe.config.optimizers import MASTERS
from megamoe.formats.config_json import preset_of
from megamoe.formats.native_files import NativeFiles
from megamoe.formats.source_checks import model_problems

BIAS = "model.layers.0.moe.router.selection_bias"


def contents(source):
    weights = {name: source.read(name, MASTERS, 0, math.prod(shape)) for name, shape in source.shapes.items()}
    return weights | source.buffers


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_shards_and_the_stacked_experts_of_transformers_5_hold_the_same_model(tmp_path):
    for name in native_models.CLASSES:
        model, folder = native_models.new_model(name), tmp_path / name
        model.save_pretrained(folder / "shards", max_shard_size="20KB")
        model.save_pretrained(folder / "stacked", save_original_format=False)
        assert len(list((folder / "shards").glob("*.safetensors"))) > 5
        assert any(key.endswith("experts.gate_up_proj") for key in load_file(folder / "stacked" / "model.safetensors"))
        shards, stacked = open_source(folder / "shards"), open_source(folder / "stacked")
        assert isinstance(shards, NativeFiles)
        assert model_problems(shards, preset_of(folder / "shards"), "it") == []
        assert same(contents(shards), contents(stacked)), name


@pytest.fixture
def directory(tmp_path):
    native_models.new_model("MiniMaxM2").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def tensors(directory):
    return load_file(directory / "model.safetensors")


def test_16_bits_are_read_as_fp32_and_biases_too(directory):
    held = tensors(directory)
    save_file({name: tensor.bfloat16() for name, tensor in held.items()}, directory / "model.safetensors")
    source = open_source(directory)
    name = "model.layers.1.moe.experts.3.up_proj.weight"
    expected = held["model.layers.1.block_sparse_moe.experts.3.w3.weight"].bfloat16().float()
    assert torch.equal(source.read(name, MASTERS, 5, 100), expected.flatten()[5:105])
    assert source.buffers[BIAS].dtype == torch.float32


def test_a_bias_that_is_missing_is_left_to_begin_at_zero(directory):
    held = {name: tensor for name, tensor in tensors(directory).items() if "layers.0" not in name or "bias" not in name}
    save_file(held, directory / "model.safetensors")
    source = open_source(directory)
    assert BIAS not in source.buffers
    assert len(source.buffers) == 2
    assert native_models.decoder_of(directory).routers()[0].selection_bias.abs().max() == 0


REFUSED = [
    ({"architectures": ["LlamaForCausalLM"]}, ("LlamaForCausalLM", "Glm4MoeForCausalLM", "give")),
    ({"quantization_config": {"quant_method": "fp8"}}, ("quantization_config", "unquantised")),
    ({"head_scale": 2}, ("head_scale", "MiniMaxM2ForCausalLM", "remove")),
    ({"scoring_func": "softmax"}, ("scoring_func", '"softmax"', '"sigmoid"')),
    ({"attn_type_list": [1, 0, 1]}, ("attn_type_list", "[1, 0, 1]")),
    ({"intermediate_size": 23}, ("shape (24, 32)", "(23, 32)", "config.json")),
    ({"num_hidden_layers": 4}, ("lacks model.layers.3.",)),
    ({"num_hidden_layers": 2}, ("model.layers.2.", "no place")),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, ("longrope", "yarn")),
]


def test_a_configuration_that_does_not_fit_is_one_sentence(directory):
    path = directory / "config.json"
    whole = path.read_text()
    for changes, parts in REFUSED:
        path.write_text(whole)
        native_models.edit_config(directory, **changes)
        has(refusal(open_source, directory), str(directory), *parts)
    values = json.loads(whole)
    del values["hidden_size"]
    path.write_text(json.dumps(values))
    has(refusal(open_source, directory), "hidden_size", "missing")


def test_quantised_tensors_are_one_sentence(directory):
    held, name = tensors(directory), "model.layers.1.self_attn.q_proj"
    for key, tensor in (
        (f"{name}.weight", torch.zeros(48, 32, dtype=torch.float8_e4m3fn)),
        (f"{name}.qweight", torch.zeros(4, 48, dtype=torch.int32)),
    ):
        save_file({**held, key: tensor}, directory / "model.safetensors")
        has(refusal(open_source, directory), key, "quantised")


def test_a_missing_shard_is_one_sentence_with_and_without_an_index(tmp_path):
    native_models.new_model("Olmoe").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[3]
    shard.unlink()
    has(refusal(open_source, tmp_path), shard.name, "missing")
    (tmp_path / "model.safetensors.index.json").unlink()
    has(refusal(open_source, tmp_path), "lacks model.", "fetch")


def test_no_pickle_is_opened_and_no_code_run(directory, tmp_path):
    torch.save({"a": Malicious(tmp_path / "mark")}, directory / "pytorch_model.bin")
    index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (directory / "modeling_x.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    native_models.edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert isinstance(open_source(directory), NativeFiles)
    (directory / "model.safetensors").unlink()
    has(refusal(open_source, directory), "pytorch_model.bin", "pickle", "safetensors")
    assert not (tmp_path / "mark").exists()
