"""Reading weights from any form. The forms with an optimizer have tests of their own: test_indexed_files.py,
test_deepspeed_files.py."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines import plain_state
from form_1 import CHECKPOINT as BEFORE
from form_1 import Malicious
from indexed import flip_bit
from ranks import run_ranks
from refusals import has, only, refusal, sentences
from safetensors.torch import load_file, save_file
from toy import PRESET, ds_config, train_here, write_inputs

from megamoe.checkpoint.deepspeed_files import RankFiles
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.checkpoint.opening import PlainFiles, find_checkpoint, open_source, run_record
from megamoe.config.model import ModelConfig
from megamoe.formats.source import load_weights
from megamoe.formats.source_checks import model_problems
from megamoe.model.costs import parameter_shapes
from megamoe.model.decoder import Decoder
from megamoe.model.names import is_buffer

CONFIG = ModelConfig(**PRESET)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of two ranks that share each layer's experts, with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    run = write_inputs(folder, ds_config(2))
    run_ranks(2, train_here, {**run, "ep_size": 2, "steps": 4, "save_interval": 2, "run_dir": str(folder / "run")})
    return folder / "run"


def weights():
    model = Decoder(CONFIG, seed=1)
    for buffer in (router.selection_bias for router in model.routers()):
        buffer.copy_(torch.rand(4))
    return {name: tensor.clone() for name, tensor in plain_state(model).items()}


# --- what is there --------------------------------------------------------------------------------------------------


def test_each_form_is_opened_by_its_reader(run_dir, tmp_path):
    assert isinstance(open_source(run_dir / "checkpoints" / "step_4"), IndexedFiles)
    assert isinstance(open_source(BEFORE), RankFiles)
    torch.save(weights(), tmp_path / "w.pt")
    assert isinstance(open_source(tmp_path / "w.pt"), PlainFiles)


def test_any_reader_of_safetensors_finds_the_fp32_masters_and_moments_of_a_rank(run_dir):
    checkpoint = run_dir / "checkpoints" / "step_4"
    source = open_source(checkpoint)
    joined = {}
    for rank in range(2):
        for name, values in load_file(checkpoint / f"rank_{rank:05d}.safetensors").items():
            kind, _, parameter = name.partition("/")
            assert kind in ("fp32", "exp_avg", "exp_avg_sq", "buffer")
            joined.setdefault(kind, {}).setdefault(parameter, []).append(values)
    assert joined["buffer"].keys() == source.buffers.keys()
    for kind in ("fp32", "exp_avg", "exp_avg_sq"):
        assert joined[kind].keys() == source.shapes.keys()
        for name, pieces in joined[kind].items():
            whole = source.read(name, kind, 0, torch.Size(source.shapes[name]).numel())
            assert torch.equal(whole, torch.cat(pieces)) or torch.equal(whole, torch.cat(pieces[::-1]))


def test_what_is_no_dict_of_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "weights.pt")
    has(refusal(open_source, tmp_path / "weights.pt"), "no state_dict")
    torch.save({"x": Malicious(tmp_path / "mark")}, tmp_path / "weights.pt")
    has(refusal(open_source, tmp_path / "weights.pt"), "weights.pt", "system", "do not open it")
    assert not (tmp_path / "mark").exists()


def test_a_folder_of_something_else_says_what_can_be_given(tmp_path):
    has(refusal(open_source, tmp_path), "holds no checkpoint and no weights", "Hugging Face")
    torch.save({"module": {}}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    has(refusal(open_source, tmp_path), "not laid out", "ds_config")


def test_a_run_that_has_not_saved_yet_holds_no_checkpoint(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    has(refusal(open_source, find_checkpoint(tmp_path)), str(tmp_path), "holds no checkpoint and no weights")


def test_the_newest_checkpoint_of_a_run_that_is_verified_is_found_with_a_line_for_each_passed_over(
    run_dir, tmp_path, capsys
):
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    assert find_checkpoint(copy).name == "step_4"
    (copy / "checkpoints" / "latest").write_text("step_2")  # says nothing to us
    assert find_checkpoint(copy).name == "step_4"
    assert capsys.readouterr().out == ""
    path = copy / "checkpoints" / "step_4" / "rank_00001.safetensors"
    flip_bit(path, path.stat().st_size - 1)
    assert find_checkpoint(copy).name == "step_2"
    assert only(capsys.readouterr().out.splitlines()).startswith(f"passed over {path.parent}: {path} has not the SHA")
    shutil.copytree(copy / "checkpoints" / "step_2", copy / "checkpoints" / "step_2.1")
    assert find_checkpoint(copy).name == "step_2.1"  # the run went back, and was here since
    for name in ("step_2", "step_2.1"):
        (copy / "checkpoints" / name / "rank_00000.safetensors").unlink()
    capsys.readouterr()
    has(refusal(find_checkpoint, copy), "every checkpoint in", "is damaged")
    assert len(sentences(capsys.readouterr().out.splitlines())) == 3
    has(refusal(find_checkpoint, tmp_path / "none"), "does not exist")
    has(refusal(find_checkpoint, path.parent), str(path), "SHA-256")  # of one alone nothing is passed over


def test_a_newest_folder_that_was_not_saved_completely_is_passed_over(run_dir, tmp_path, capsys):
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    shutil.copytree(copy / "checkpoints" / "step_4", copy / "checkpoints" / "step_6")
    (copy / "checkpoints" / "step_6" / "index.json").unlink()
    assert find_checkpoint(copy).name == "step_4"
    has(only(capsys.readouterr().out.splitlines()), "passed over", "step_6 was not saved completely")
    has(refusal(open_source, copy / "checkpoints" / "step_6"), "was not saved completely")


def test_the_record_of_the_run_comes_from_the_checkpoint_or_from_its_run(run_dir, tmp_path):
    record = run_record(run_dir / "checkpoints" / "step_4")
    assert record["model"] == CONFIG.model_dump()
    assert record["run_id"] == json.loads((run_dir / "run.json").read_text())["run_id"]
    assert run_record(BEFORE) == json.loads((BEFORE / "run.json").read_text())
    checkpoint = shutil.copytree(BEFORE, tmp_path / "run" / "checkpoints" / "step_3")
    (checkpoint / "run.json").unlink()
    assert run_record(checkpoint) == {}
    (tmp_path / "run" / "run.json").write_text('{"seed": 3}')
    assert run_record(checkpoint) == {"seed": 3}


# --- plain weights --------------------------------------------------------------------------------------------------


def write_index(folder, state):
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}'.replace("'", '"'))


def test_plain_weights_of_every_form_load_into_a_model(tmp_path):
    state = weights()
    folders = [tmp_path / name for name in ("tied", "index")]
    for folder in folders:
        folder.mkdir()
    torch.save(state, tmp_path / "w.pt")
    save_file(state, tmp_path / "w.safetensors")
    torch.save({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, folders[0] / "pytorch_model.bin")
    write_index(folders[1], state)
    for path in (tmp_path / "w.pt", tmp_path / "w.safetensors", *folders):
        source = open_source(path)
        assert isinstance(source, PlainFiles)
        assert model_problems(source, CONFIG, "it") == []
        model = Decoder(CONFIG)
        load_weights(model, source, torch.float32)
        loaded = plain_state(model)
        assert loaded.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items()), path


def test_a_shard_that_the_index_names_and_is_missing_is_named(tmp_path):
    write_index(tmp_path, weights())
    (tmp_path / "b.safetensors").unlink()
    has(refusal(open_source, tmp_path), "b.safetensors", "missing")


def test_a_shard_outside_the_folder_is_refused_though_it_is_there(tmp_path):
    (tmp_path / "in" / "shards").mkdir(parents=True)
    write_index(tmp_path / "in", weights())
    save_file(weights(), tmp_path / "w.safetensors")
    for name in ("../w.safetensors", "shards/../../w.safetensors", f"{tmp_path}/w.safetensors"):
        (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        has(refusal(open_source, tmp_path / "in"), "index.json", name, "outside its folder", "again")


def test_a_head_that_equals_the_embedding_is_a_head_of_its_own_where_the_model_has_one(tmp_path):
    state = weights()
    torch.save({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, tmp_path / "w.pt")
    source = open_source(tmp_path / "w.pt")
    for tied in (False, True):
        assert model_problems(source, CONFIG.model_copy(update={"tie_word_embeddings": tied}), "it") == []


def test_an_index_without_a_map_is_one_sentence(tmp_path):
    write_index(tmp_path, weights())
    for index in ("{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        has(refusal(open_source, tmp_path), "has no weight_map")


def test_a_head_of_its_own_is_read_and_does_not_fit_a_model_that_ties_it(tmp_path):
    torch.save({**weights(), "lm_head.weight": torch.zeros(96, 32)}, tmp_path / "w.pt")
    source = open_source(tmp_path / "w.pt")
    assert source.shapes["lm_head.weight"] == (96, 32)
    assert model_problems(source, CONFIG.model_copy(update={"tie_word_embeddings": False}), "it") == []
    has(only(model_problems(source, CONFIG, "it")), "tie_word_embeddings false, not true", "preset")
    torch.save(weights(), tmp_path / "w.pt")
    untied = CONFIG.model_copy(update={"tie_word_embeddings": False})
    has(only(model_problems(open_source(tmp_path / "w.pt"), untied, "it")), "tie_word_embeddings true, not false")


def test_a_torn_safetensors_file_is_one_sentence(tmp_path):
    save_file(weights(), tmp_path / "w.safetensors")
    os.truncate(tmp_path / "w.safetensors", 1000)
    has(refusal(open_source, tmp_path / "w.safetensors"), "w.safetensors", "cannot be read")


def test_weights_load_in_the_dtype_asked_for_and_router_statistics_in_fp32(run_dir):
    source = open_source(run_dir / "checkpoints" / "step_4")
    model = Decoder(ModelConfig(**PRESET))
    load_weights(model, source, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for router in model.routers():
        assert router.selection_bias.dtype == router.running_load.dtype == torch.float32
        assert router.selection_bias.abs().sum() > 0
    whole = source.read("model.embed_tokens.weight", "fp32", 0, 96 * 32).view(96, 32)
    assert torch.equal(model.embed_tokens.weight, whole.bfloat16())


# --- another model --------------------------------------------------------------------------------------------------


SHAPES = [
    ({"hidden_size": 64}, ["hidden_size 32, not 64"]),
    ({"num_hidden_layers": 3}, ["num_hidden_layers 2, not 3"]),
    ({"num_hidden_layers": 1}, ["num_hidden_layers 2, not 1"]),
    ({"num_local_experts": 8}, ["num_local_experts 4, not 8"]),
    ({"num_local_experts": 2}, ["num_local_experts 4, not 2"]),
    ({"num_latent_tokens": 0}, ["with num_latent_tokens, not without it"]),
    ({"num_key_value_heads": 4}, ["num_key_value_heads x head_dim 16, not 32"]),
    ({"gated_mlp": True}, ["gated_mlp false, not true"]),
    ({"vocab_size": 1, "intermediate_size": 2}, ["vocab_size 96, not 1;", "intermediate_size 48, not 2;"]),
]


def test_a_checkpoint_of_another_shape_is_refused_with_each_field_that_differs(run_dir):
    source = open_source(run_dir / "checkpoints" / "step_4")
    assert model_problems(source, ModelConfig(**PRESET), "step_4") == []
    for changes, fields in SHAPES:
        problems = model_problems(source, ModelConfig(**{**PRESET, **changes}), "step_4")
        assert len(problems) == len(fields)
        for problem, field in zip(problems, fields, strict=True):
            has(problem, "step_4 was made with", field)


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save({**weights(), "model.layers.0.moe.gate.weight": torch.zeros(1)}, tmp_path / "w.pt")
    problem = only(model_problems(open_source(tmp_path / "w.pt"), CONFIG, "w.pt"))
    has(problem, "w.pt has, beyond the model, model.layers.0.moe.gate.weight")


def source_of(config):
    """The shapes and biases of a new model, as a source."""
    state = plain_state(Decoder(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if not is_buffer(name)}
    return SimpleNamespace(shapes=shapes, buffers={name: one for name, one in state.items() if is_buffer(name)})


def test_parts_that_a_model_has_or_has_not_are_named_by_their_fields():
    for made, wanted, words in (
        ({}, {"num_nextn_predict_layers": 1}, ["without num_nextn_predict_layers, not with it"]),
        ({"first_k_dense_replace": 1}, {}, ["dense blocks [0], not []", "first_k_dense_replace"]),
        ({"mlp_only_layers": [1]}, {"mlp_only_layers": [0]}, ["dense blocks [1], not [0]", "mlp_only_layers"]),
    ):
        source = source_of(ModelConfig(**PRESET, **made))
        has(only(model_problems(source, ModelConfig(**PRESET, **wanted), "it")), "it was made", *words, "preset")


def test_a_balancing_bias_that_the_model_has_no_place_for_is_refused_unless_it_is_zero():
    source, without = source_of(CONFIG), CONFIG.model_copy(update={"router_bias": False})
    assert model_problems(source, without, "it") == []
    source.buffers["model.layers.1.moe.router.selection_bias"] += 0.1
    has(only(model_problems(source, without, "it")), "balancing bias", "router_bias is false")


def test_another_kind_of_qk_norm_is_named_and_no_size_that_is_right():
    other = CONFIG.model_copy(update={"qk_norm": "full", "tie_word_embeddings": False})
    shapes = {name: tuple(shape.values()) for name, shape in parameter_shapes(other).items()}
    source = SimpleNamespace(shapes=shapes, buffers={})
    problem = only(model_problems(source, other.model_copy(update={"qk_norm": "head"}), "here"))
    has(problem, "here: model.layers.0.self_attn.q_norm.weight has 32 numbers, not 8", "another qk_norm")
