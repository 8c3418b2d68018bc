"""A model from wherever it is: what it is of, and what is refused."""

import json
import shutil

import native_models
import pytest
import torch
from engines import plain_state
from form_1 import RUN, seal
from refusals import has, refusal
from safetensors.torch import save_file

from megamoe.checkpoint.open_model import open_model
from megamoe.config.model import ModelConfig
from megamoe.formats.config_json import differences, preset_of

STEP = RUN / "checkpoints" / "step_3"


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a checkpoint whose record has other values."""

    def checkpoint(**changes):
        record = json.loads((STEP / "run.json").read_text())
        copy = shutil.copytree(STEP, tmp_path / "step_3", dirs_exist_ok=True)
        (copy / "manifest.json").unlink()
        seal(copy, record | changes)
        return copy

    return checkpoint


@pytest.fixture
def directory(tmp_path):
    native_models.new_model("Glm4Moe").to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_run_and_its_checkpoint_say_what_they_are_of():
    for path in (RUN, STEP):
        model = open_model(path)
        assert model.path == STEP
        assert model.config == ModelConfig(**json.loads((STEP / "run.json").read_text())["model"])
        assert not model.load(torch.float32, torch.device("cpu")).training


def test_a_directory_has_its_config_and_the_dtype_that_it_gives(directory):
    model = open_model(directory)
    assert (model.config, model.dtype) == (preset_of(directory), torch.bfloat16)
    assert model.tokenizer is None
    (directory / "tokenizer.json").write_text("{}")
    assert open_model(directory).tokenizer == directory / "tokenizer.json"


def test_multi_token_prediction_that_the_weights_have_is_in_the_configuration(directory):
    assert open_model(directory).config.num_nextn_predict_layers == 0
    native_models.add_mtp(directory)
    assert open_model(directory).config.num_nextn_predict_layers == 1


def test_the_balancing_bias_of_a_directory_is_not_dropped_without_a_word(directory):
    without = preset_of(directory).model_copy(update={"router_bias": False})
    has(refusal(open_model, directory, without), str(directory), "balancing bias", "router_bias is false")


def test_a_file_needs_a_configuration_and_fits_it(tmp_path, directory):
    config, decoder = preset_of(directory), native_models.decoder_of(directory)
    save_file({name: one.clone() for name, one in plain_state(decoder).items()}, tmp_path / "w.safetensors")
    has(refusal(open_model, tmp_path / "w.safetensors"), "does not say what model", "preset")
    assert open_model(tmp_path / "w.safetensors", config).dtype == torch.float32
    other = config.model_copy(update={"vocab_size": 100})
    has(refusal(open_model, tmp_path / "w.safetensors", other), "vocab_size 96, not 100")


def test_a_configuration_that_is_not_the_models_own_is_refused_and_one_for_training_is_not(directory, checkpoint):
    for place in (directory, checkpoint()):
        own = open_model(place).config
        other = own.model_copy(update={"rms_norm_eps": 0.5, "rope_theta": 3.0})
        assert differences(own, other) == ["rms_norm_eps", "rope_theta"]
        has(refusal(open_model, place, other), str(place), "rms_norm_eps, rope_theta", "leave the preset out")
        trained_otherwise = own.model_copy(update={"router_bias_rate": 0.5})
        assert open_model(place, trained_otherwise).config == trained_otherwise


def test_a_record_of_wrong_types_is_one_sentence(checkpoint):
    for changes, words in (
        ({"model": [1]}, ["does not say what model"]),
        ({"model": {**open_model(STEP).config.model_dump(), "hidden_size": "32"}}, ["hidden_size", '"32"']),
        ({"deepspeed": [1]}, ["deepspeed is [1]"]),
    ):
        path = checkpoint(**changes)
        has(refusal(open_model, path), str(path), *words)


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    has(refusal(open_model, tmp_path), "holds no checkpoint yet")
