"""What config.json says is what transformers reads there: every key of it counts, or the table says why not."""

import copy
import json
import math
import shutil

import native_models
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from model_parts import PARTS, model_of
from refusals import has, refusal, sentences

from megamoe.checkpoint.opening import open_source
from megamoe.config.model import load_preset, preset_names
from megamoe.formats.architectures import ARCHITECTURES, REQUIRED
from megamoe.formats.config_json import (
    TRAINING,
    differences,
    find_preset,
    fitting,
    misfits,
    preset_of,
    read_config,
    read_directory,
    write_config,
)
from megamoe.formats.export import huggingface_config, native_class, write_native
from megamoe.utils.errors import UserError

NAMES = [name.removesuffix("ForCausalLM") for name in ARCHITECTURES]


def transformers_config(name, **values):
    import transformers

    return getattr(transformers, f"{name}Config")(**values)


# --- the table against transformers -----------------------------------------------------------------------------------


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


def test_the_table_knows_every_key_that_transformers_writes(tmp_path):
    for name in NAMES:
        native_models.new_model(name).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert len(written) > 20
        architecture, config = read_directory(tmp_path)
        assert architecture.name == f"{name}ForCausalLM"
        given = native_models.COMMON | native_models.CLASSES[name]
        for key, one in architecture.keys.items():
            if key in given and key in written and not one.values and not one.switch:
                assert getattr(config, one.field) == given[key] == written[key], (name, key)


# --- the same in both directions --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=NAMES)
def exported(request, tmp_path_factory):
    """(class, directory as megamoe writes it, a batch, what transformers makes of it)."""
    folder = tmp_path_factory.mktemp(request.param)
    native_models.new_model(request.param).save_pretrained(folder / "in")
    source, config = open_source(folder / "in"), preset_of(folder / "in")
    architecture, _ = native_class(source, config)
    write_native(source, folder / "out", torch.float32, 10**9, config, architecture, None)
    batch = native_models.clear_batch(native_models.decoder_of(folder / "in"))
    return request.param, folder / "out", batch, native_models.run_theirs(native_models.load(folder / "out"), *batch)


def test_what_is_written_reads_as_the_same_model_and_fits_one_class(exported):
    name, folder, _, _ = exported
    config = preset_of(folder)
    values = json.loads((folder / "config.json").read_text())
    assert values["architectures"] == [f"{name}ForCausalLM"]
    assert fitting(config).name == f"{name}ForCausalLM"
    assert sum(not misfits(one, config) for one in ARCHITECTURES.values()) == 1


def other(key, value):
    """Another value of a key, small enough for the tiny model."""
    if key == "hidden_act":
        return "silu"
    if isinstance(value, str):
        return {"linear": "default"}.get(value, "linear") if key == "rope_type" else "softmax"
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [2] if value != [2] else [1]
    if key in ("num_experts_per_tok", "topk_group", "n_group", "num_key_value_heads"):
        return {3: 2, 2: 1, 4: 2}[value]
    if key == "original_max_position_embeddings":
        return value // 4
    return value + 1 if isinstance(value, int) else value * 1.5


def flips(values):
    """(name of what is changed, the changed values) for every key that has a value, those of rope_scaling included."""
    for key, value in values.items():
        if isinstance(value, dict):
            for inner, of_inner in value.items():
                if not isinstance(of_inner, str) or inner == "rope_type":
                    changed = copy.deepcopy(values)
                    changed[key][inner] = other(inner, of_inner)
                    yield f"{key}.{inner}", changed
        elif value is not None and key not in ("architectures", "model_type", "dtype"):
            yield key, {**values, key: other(key, value)}


# Shapes that do not fit the weights, and values that the class's own checks refuse.
REFUSED = (RuntimeError, ValueError, StrictDataclassError)


def is_idle(name, key, value):
    """Whether the table says why a key's value decides nothing of what transformers computes."""
    architecture = ARCHITECTURES[f"{name}ForCausalLM"]
    if key in architecture.keys and architecture.keys[key].field in TRAINING:
        return True
    if key in architecture.ignored or (key in architecture.stated and key != "decoder_sparse_step"):
        return True  # `stated` is for other servers
    # Only "dynamic" scaling reads the first; files with a head of its own have it, whatever the second says.
    return key == "max_position_embeddings" or (key == "tie_word_embeddings" and not value)


def shapes(run):
    return [one.shape for one in (run.logits, *run.hidden, *run.experts)]


def test_another_value_of_any_key_makes_another_model(exported, tmp_path):
    name, folder, batch, run = exported
    written = json.loads((folder / "config.json").read_text())

    def distance(key, values):
        """From the model as it was written; infinite where the weights or the class's checks refuse the values."""
        other = tmp_path / key
        other.mkdir()
        (other / "model.safetensors").symlink_to(folder / "model.safetensors")
        (other / "config.json").write_text(json.dumps(values))
        try:
            found = native_models.run_theirs(native_models.load(other), *batch)
        except REFUSED:
            return math.inf
        finally:
            shutil.rmtree(other)
        if shapes(found) != shapes(run):
            return math.inf
        return native_models.distance(found, run)

    assert distance("unchanged", written) < 1e-4
    found = {key: distance(key, values) for key, values in flips(written)}
    assert len(found) > 15
    assert sum(one < math.inf for one in found.values()) > 3  # most that are refused change a shape
    idle = [key for key, one in found.items() if one < 1e-4]
    assert [key for key in idle if not is_idle(name, key, written.get(key))] == []


# --- other forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3"])
def test_frequencies_by_length_agree_on_either_side_of_the_trained_length(tmp_path, name):
    rope = {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 3.0}
    ids = torch.randint(native_models.VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 9, dtype=torch.bool)  # of a padded batch, transformers takes the longest row for all
    runs = []
    for trained in (5, 64):
        folder = tmp_path / str(trained)
        model = native_models.new_model(name, rope_parameters=rope, max_position_embeddings=trained)
        model.save_pretrained(folder)
        runs.append(native_models.run_theirs(model, ids, real))
        ours = native_models.run_ours(native_models.decoder_of(folder), ids, real)
        assert native_models.distance(ours, runs[-1]) < 1e-4
    assert native_models.distance(*runs) > 1e-3


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


def read_or_refused(architecture, values):
    try:
        read_config(architecture, values, "config.json")
    except UserError as error:
        sentences(error.problems)


@pytest.mark.parametrize("name", NAMES)
def test_any_value_of_any_key_is_read_or_refused_in_sentences(name):
    architecture = ARCHITECTURES[f"{name}ForCausalLM"]
    config = transformers_config(name, **native_models.COMMON | native_models.CLASSES[name])
    values = json.loads(config.to_json_string())
    values["rope_parameters"].pop("partial_rotary_factor", None)
    read_config(architecture, values, "config.json")
    for key in (*values, "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_dim", "num_mtp_layers"):
        for value in (None, "x", [], ["x"], {}, {"a": 1}, -1, 0, 0.5, True, 2**40):
            read_or_refused(architecture, {**values, key: value})
    for key in values["rope_parameters"]:
        for value in (None, "x", [], {}, -1, 0, 0.5, True):
            read_or_refused(architecture, {**values, "rope_parameters": {**values["rope_parameters"], key: value}})
