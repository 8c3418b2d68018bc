"""What is opened at a path: a run's newest checkpoint that is verified, and a model of any form."""

import json
import shutil
from pathlib import Path

import native_models
import pytest
import torch
from indexed import write, write_both
from refusals import has, refusal
from toy import PRESET

from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.checkpoint.opening import find_checkpoint, open_model, open_source, run_record
from megamoe.checkpoint.universal import UniversalFiles
from megamoe.config.model import ModelConfig
from megamoe.formats.config_json import differences, preset_of
from megamoe.model.costs import parameter_shapes

CONFIG = ModelConfig(**PRESET)
RECORD = {"run_id": "mine", "model": CONFIG.model_dump(), "deepspeed": {"bf16": {"enabled": True}}}
SHAPES = parameter_shapes(CONFIG)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of two ranks that share each parameter, with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    for step in (2, 4):
        write(folder / "checkpoints" / f"step_{step}", run_id="mine", shapes=SHAPES, run=RECORD)
    (folder / "run.json").write_text(json.dumps({"run_id": "mine"}))
    return folder


@pytest.fixture
def run_dir(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture
def directory(tmp_path):
    native_models.new_model("Glm4Moe").to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_each_form_is_opened_by_its_reader_and_says_of_which_run_it_is(run_dir, tmp_path):
    forms = write_both(tmp_path)
    assert isinstance(open_source(forms["own"]), IndexedFiles)
    assert isinstance(open_source(forms["universal"]), UniversalFiles)
    assert run_record(run_dir / "checkpoints" / "step_4") == RECORD
    assert run_record(forms["universal"]) == {"preset": "made up"}
    (forms["universal"] / "run.json").unlink()
    assert run_record(forms["universal"]) == {}
    checkpoint = Path(shutil.copytree(forms["universal"], tmp_path / "other" / "checkpoints" / "step_3"))
    (tmp_path / "other" / "run.json").write_text('{"seed": 3}')
    assert run_record(checkpoint) == {"seed": 3}


def test_a_folder_of_something_else_or_a_run_that_has_not_saved_yet_says_what_can_be_given(tmp_path):
    has(refusal(open_source, tmp_path), "holds no checkpoint and no weights", "Hugging Face")
    for name in ("mp_rank_00_model_states.pt", "zero/optimizer_state.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({}, tmp_path / name)
    has(refusal(open_source, tmp_path), "not laid out")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    has(refusal(open_source, find_checkpoint(run)), str(run), "holds no checkpoint and no weights")
    has(refusal(open_model, run), "holds no checkpoint yet")


def test_a_run_its_checkpoint_and_a_directory_say_what_they_are_of(run_dir, directory):
    for path in (run_dir, run_dir / "checkpoints" / "step_4"):
        model = open_model(path)
        assert model.path == run_dir / "checkpoints" / "step_4"
        assert (model.config, model.dtype) == (CONFIG, torch.bfloat16)
        assert not model.load(torch.float32, torch.device("cpu")).training
    model = open_model(directory)
    assert (model.config, model.dtype) == (preset_of(directory), torch.bfloat16)
    assert model.config.num_nextn_predict_layers == 0
    assert model.tokenizer is None
    (directory / "tokenizer.json").write_text("{}")
    assert open_model(directory).tokenizer == directory / "tokenizer.json"
    native_models.add_mtp(directory)
    assert open_model(directory).config.num_nextn_predict_layers == 1


def test_a_configuration_that_is_not_the_models_own_is_refused_and_one_for_training_is_not(directory, run_dir):
    for place in (directory, run_dir / "checkpoints" / "step_4"):
        own = open_model(place).config
        other = own.model_copy(update={"rms_norm_eps": 0.5, "rope_theta": 3.0})
        assert differences(own, other) == ["rms_norm_eps", "rope_theta"]
        has(refusal(open_model, place, other), str(place), "rms_norm_eps, rope_theta", "leave the preset out")
        trained_otherwise = own.model_copy(update={"router_bias_rate": 0.5})
        assert open_model(place, trained_otherwise).config == trained_otherwise
    without = preset_of(directory).model_copy(update={"router_bias": False})
    has(refusal(open_model, directory, without), str(directory), "balancing bias", "router_bias is false")


def test_a_record_of_wrong_types_is_one_sentence(tmp_path):
    for number, (changes, words) in enumerate((
        ({"model": [1]}, ["does not say what model"]),
        ({"model": {**CONFIG.model_dump(), "hidden_size": "32"}}, ["hidden_size", '"32"']),
    )):  # fmt: skip
        path = tmp_path / str(number) / "step_3"
        write(path, shapes=SHAPES, run=RECORD | changes)
        has(refusal(open_model, path), str(path), *words)
