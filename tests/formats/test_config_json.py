"""What config.json says is what transformers reads there: every key of it counts, or the table says why not."""

import json

import native_models
import pytest
from model_parts import PARTS, model_of
from refusals import complaints, has, refusal

from megamoe.config.model import load_preset, preset_names
from megamoe.formats.architectures import ARCHITECTURES, REQUIRED
from megamoe.formats.config_json import (
    differences,
    find_preset,
    misfits,
    preset_of,
    read_config,
    write_config,
)
from megamoe.formats.export import huggingface_config

NAMES = [name.removesuffix("ForCausalLM") for name in ARCHITECTURES]


def transformers_config(name, **values):
    import transformers

    return getattr(transformers, f"{name}Config")(**values)


def test_a_missing_key_has_the_value_that_transformers_gives_it():
    for name in NAMES:
        architecture, theirs = ARCHITECTURES[f"{name}ForCausalLM"], transformers_config(name)
        assert architecture.model_type == theirs.model_type
        for key, one in architecture.keys.items():
            if one.default is not REQUIRED and key != "head_dim" and one.switch is None:
                of_heads = one.default is None and key == "num_key_value_heads"
                expected = theirs.num_attention_heads if of_heads else one.default
                assert getattr(theirs, key) == (list(expected) if isinstance(expected, tuple) else expected), (
                    name,
                    key,
                )
        assert theirs.rope_parameters["rope_theta"] == architecture.rope_theta
        if architecture.rotary:
            assert theirs.rope_parameters.get("partial_rotary_factor", 1.0) == architecture.rotary_default


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_reads_as_the_same_model_and_fits_one_class(name, tmp_path):
    native_models.new_model(name).save_pretrained(tmp_path)
    config = preset_of(tmp_path)
    assert [one.name for one in ARCHITECTURES.values() if not misfits(one, config)] == [f"{name}ForCausalLM"]
    written = write_config(ARCHITECTURES[f"{name}ForCausalLM"], config)
    assert read_config(ARCHITECTURES[f"{name}ForCausalLM"], written, "config.json") == config


def test_the_export_that_carries_its_code_is_read_back_but_for_training(tmp_path):
    for config in (*map(model_of, PARTS), *map(load_preset, preset_names())):
        written = json.loads(json.dumps(huggingface_config(config)))
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert differences(config, find_preset(str(tmp_path))) == []


def test_a_rope_scaling_that_is_no_object_is_refused(tmp_path):
    olmoe = write_config(ARCHITECTURES["OlmoeForCausalLM"], load_preset("olmoe-7b-a1b"))
    for scaling in ("yarn", ["a"], 5, 0, []):
        for values in (huggingface_config(load_preset("tiny")), olmoe):
            (tmp_path / "config.json").write_text(json.dumps({**values, "rope_parameters": scaling}))
            has(refusal(preset_of, tmp_path), "rope_parameters is", json.dumps(scaling), "object")


def test_a_name_that_ships_is_no_directory(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_preset("tiny") == load_preset("tiny")
    has(refusal(find_preset, "nowhere"), "Hugging Face directory")


EVERY_CLASS = {"id2label": {"0": "LABEL_0"}, "label2id": {}, "problem_type": None, "chunk_size_feed_forward": 0}
CODER = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0, "mlp_only_layers": None}


@pytest.mark.parametrize("name", NAMES)
def test_a_published_key_of_no_effect_is_taken_and_refused_only_where_its_value_counts(name):
    architecture = ARCHITECTURES[f"{name}ForCausalLM"]
    values = transformers_config(name, **native_models.COMMON | native_models.CLASSES[name]).to_dict()
    values |= {"mlp_only_layers": []} if name == "Qwen3Moe" else {}
    plain = read_config(architecture, values, "config.json")
    further = EVERY_CLASS | {"is_encoder_decoder": False} | (CODER if name == "Qwen3Moe" else {})
    assert read_config(architecture, values | further, "config.json") == plain
    wrong = {"is_encoder_decoder": True}
    if name == "Qwen3Moe":
        wrong |= {"qkv_bias": True, "use_qk_norm": False, "shared_expert_intermediate_size": 512}
    for key, value in wrong.items():
        has(refusal(read_config, architecture, values | {key: value}, "config.json"), f"{key} is", "alone")


@pytest.mark.parametrize("name", NAMES)
def test_any_value_of_any_key_is_read_or_refused_in_sentences(name):
    architecture = ARCHITECTURES[f"{name}ForCausalLM"]
    config = transformers_config(name, **native_models.COMMON | native_models.CLASSES[name])
    values = json.loads(config.to_json_string())
    values["rope_parameters"].pop("partial_rotary_factor", None)
    read_config(architecture, values, "config.json")
    for key in (*values, "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_dim", "num_mtp_layers"):
        for value in (None, "x", [], ["x"], {}, {"a": 1}, -1, 0, 0.5, True, 2**40):
            complaints(read_config, architecture, {**values, key: value}, "config.json")
    for key in values["rope_parameters"]:
        for value in (None, "x", [], {}, -1, 0, 0.5, True):
            changed = {**values, "rope_parameters": {**values["rope_parameters"], key: value}}
            complaints(read_config, architecture, changed, "config.json")
