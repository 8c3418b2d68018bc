"""Reading weights from any form, and refusing what could run code or is damaged. Checkpoints of several ranks are in
test_restore.py."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from refusals import has, only, refusal
from safetensors.torch import save_file
from toy import PRESET, ds_config, train_here, write_inputs

from megamoe.checkpoint.reader import PlainFiles, find_checkpoint, load_weights, model_problems, open_source
from megamoe.checkpoint.unpickle import safe_load
from megamoe.config import ModelConfig
from megamoe.errors import UserError
from megamoe.model.decoder import Decoder
from megamoe.model.names import plain_name

CONFIG = ModelConfig(**PRESET)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of two ranks that share each layer's experts, with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    run = write_inputs(folder, ds_config(2))
    run_ranks(2, train_here, {**run, "ep_size": 2, "steps": 4, "save_interval": 2, "run_dir": str(folder / "run")})
    return folder / "run"


@pytest.fixture
def checkpoint(run_dir, tmp_path):
    return Path(shutil.copytree(run_dir / "checkpoints" / "step_4", tmp_path / "step_4"))


def plain_state(dtype=torch.float32):
    model = Decoder(CONFIG, seed=1)
    for buffer in (router.selection_bias for router in model.routers()):
        buffer.copy_(torch.rand(4))
    return {plain_name(name): tensor.detach().to(dtype).clone() for name, tensor in model.state_dict().items()}


# --- safety ---------------------------------------------------------------------------------------------------------


class Malicious:
    """Leaves a mark where it is unpickled without care."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize(
    "name",
    ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"],
)
def test_a_planted_pickle_is_refused_by_name_and_does_not_run(checkpoint, tmp_path, name):
    mark = tmp_path / "mark"
    state = torch.load(checkpoint / name, weights_only=False)
    state["ds_version"] = Malicious(mark)
    torch.save(state, checkpoint / name)
    has(refusal(open_source, checkpoint), str(checkpoint / name), "system", "do not open it")
    assert not mark.exists()
    torch.load(checkpoint / name, weights_only=False)  # the trap is real
    assert mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_planted_pickle_in_plain_weights_is_refused_by_name(tmp_path, zipped):
    path = tmp_path / "weights.pt"
    if zipped:
        torch.save({"x": Malicious(tmp_path / "mark")}, path)
    else:
        path.write_bytes(pickle.dumps({"x": Malicious(tmp_path / "mark")}))
    problem = refusal(open_source, path)
    has(problem, str(path))
    assert "system" in problem or "damaged" in problem  # torch does not even look into what is no archive
    assert not (tmp_path / "mark").exists()


def test_what_is_no_dict_of_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "weights.pt")
    has(refusal(open_source, tmp_path / "weights.pt"), "no state_dict")


# --- damage ---------------------------------------------------------------------------------------------------------


def test_a_missing_ranks_file_is_named(checkpoint):
    path = checkpoint / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.unlink()
    has(refusal(open_source, checkpoint), path.name, "the file of rank 1")
    has(refusal(find_checkpoint, checkpoint), str(path), "is missing")


def test_a_truncated_file_is_named(checkpoint):
    path = checkpoint / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    os.truncate(path, path.stat().st_size // 2)
    has(refusal(open_source, checkpoint), str(path), "damaged")
    has(refusal(find_checkpoint, checkpoint), str(path), "bytes, not the")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_with_any_flipped_bit_in_its_pickle_is_one_sentence_or_read(checkpoint):
    path = checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    whole = path.read_bytes()
    start = whole.index(b"optimizer_state_dict") - 20
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        data[start + draw.randrange(4000)] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            safe_load(path)
        except UserError as error:
            refused += 1
            has(only(error.problems), str(path))
    assert refused > 100


def test_a_layout_that_does_not_say_which_values_are_whose_is_refused(checkpoint):
    path = checkpoint / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=True)
    state["ds_config"]["zero_optimization"]["round_robin_gradients"] = True
    torch.save(state, path)
    has(refusal(open_source, checkpoint), "round_robin_gradients", "save it again without")


@pytest.mark.parametrize("name", ["../../escaped", "layers/0", ""])
def test_a_parameter_whose_name_leads_out_of_the_folder_is_refused(checkpoint, name):
    path = checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=False)
    mapping = state["optimizer_state_dict"]["param_slice_mappings"][0]
    mapping[name] = next(iter(mapping.values()))
    torch.save(state, path)
    has(refusal(open_source, checkpoint), str(path), repr(name), "is no name of one")


def test_files_of_two_checkpoints_do_not_pass_for_one(checkpoint, run_dir, tmp_path):
    run = write_inputs(tmp_path / "other", ds_config(2), {"hidden_size": 64})
    run_ranks(2, train_here, {**run, "ep_size": 2, "steps": 1, "run_dir": str(tmp_path / "other" / "run")})
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copyfile(tmp_path / "other" / "run" / "checkpoints" / "step_1" / name, checkpoint / name)
    has(refusal(open_source, checkpoint), "not all of one checkpoint")


def test_a_folder_of_something_else_says_what_can_be_given(tmp_path):
    has(refusal(open_source, tmp_path), "holds no checkpoint and no weights", "Hugging Face")
    torch.save({"module": {}}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    has(refusal(open_source, tmp_path), "not laid out", "ds_config")


def test_the_newest_checkpoint_of_a_run_that_holds_is_found_with_a_line_for_each_passed_over(run_dir, tmp_path, capsys):
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    assert find_checkpoint(copy).name == "step_4"
    (copy / "checkpoints" / "step_4" / "run.json").write_text("{}")
    assert find_checkpoint(copy).name == "step_2"
    assert only(capsys.readouterr().out.splitlines()).startswith(f"passed over {copy / 'checkpoints' / 'step_4'}: ")
    (copy / "checkpoints" / "step_2" / "run.json").unlink()
    has(refusal(find_checkpoint, copy), "every checkpoint in", "is damaged")
    has(refusal(find_checkpoint, tmp_path / "none"), "does not exist")


# --- plain weights --------------------------------------------------------------------------------------------------


def write_index(folder, state):
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}'.replace("'", '"'))


@pytest.mark.parametrize("form", ["pt", "safetensors", "index", "tied head"])
def test_plain_weights_of_every_form_load_into_a_model(tmp_path, form):
    state, path = plain_state(), tmp_path
    if form == "pt":
        torch.save(state, path := tmp_path / "w.pt")
    elif form == "safetensors":
        save_file(state, path := tmp_path / "w.safetensors")
    elif form == "tied head":
        torch.save({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, tmp_path / "pytorch_model.bin")
    else:
        write_index(tmp_path, state)
    source = open_source(path)
    assert isinstance(source, PlainFiles)
    assert model_problems(source, CONFIG, "it") == []
    model = Decoder(CONFIG)
    load_weights(model, source, torch.float32)
    assert {plain_name(name): tensor.tolist() for name, tensor in model.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }


def test_a_shard_that_the_index_names_and_is_missing_is_named(tmp_path):
    write_index(tmp_path, plain_state())
    (tmp_path / "b.safetensors").unlink()
    has(refusal(open_source, tmp_path), "b.safetensors", "missing")


def test_a_shard_outside_the_folder_is_refused_though_it_is_there(tmp_path):
    (tmp_path / "in" / "shards").mkdir(parents=True)
    write_index(tmp_path / "in", plain_state())
    save_file(plain_state(), tmp_path / "w.safetensors")
    for name in ("../w.safetensors", "shards/../../w.safetensors", f"{tmp_path}/w.safetensors"):
        (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        has(refusal(open_source, tmp_path / "in"), "index.json", name, "outside its folder", "again")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_one_sentence(tmp_path, index):
    write_index(tmp_path, plain_state())
    (tmp_path / "model.safetensors.index.json").write_text(index)
    has(refusal(open_source, tmp_path), "has no weight_map")


def test_a_head_that_is_not_the_embedding_is_refused(tmp_path):
    torch.save({**plain_state(), "lm_head.weight": torch.zeros(96, 32)}, tmp_path / "w.pt")
    has(refusal(open_source, tmp_path / "w.pt"), "lm_head.weight is not the embedding")


def test_a_head_without_the_embedding_that_it_is_tied_to_is_one_sentence(tmp_path):
    state = plain_state()
    head = state.pop("model.embed_tokens.weight")
    torch.save({**state, "lm_head.weight": head}, tmp_path / "w.pt")
    problem = refusal(open_source, tmp_path / "w.pt")
    has(problem, "w.pt", "lm_head.weight without model.embed_tokens.weight", "tied", "give both")


def test_a_torn_safetensors_file_is_one_sentence(tmp_path):
    save_file(plain_state(), tmp_path / "w.safetensors")
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


def test_a_stretch_that_two_ranks_share_is_joined(run_dir):
    source = open_source(run_dir / "checkpoints" / "step_4")
    for name, shape in source.shapes.items():
        count = torch.Size(shape).numel()
        whole = source.read(name, "exp_avg", 0, count)
        for start in range(0, count, 7):
            part = source.read(name, "exp_avg", start, min(11, count - start))
            assert torch.equal(part, whole[start : start + 11])


# --- another model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"hidden_size": 64}, ["hidden_size 32, not 64"]),
        ({"vocab_size": 100}, ["vocab_size 96, not 100"]),
        ({"intermediate_size": 50}, ["intermediate_size 48, not 50"]),
        ({"num_hidden_layers": 3}, ["num_hidden_layers 2, not 3"]),
        ({"num_hidden_layers": 1}, ["num_hidden_layers 2, not 1"]),
        ({"num_local_experts": 8}, ["num_local_experts 4, not 8"]),
        ({"num_local_experts": 2}, ["num_local_experts 4, not 2"]),
        ({"num_latent_tokens": 0}, ["num_latent_tokens 3, not 0"]),
        ({"num_key_value_heads": 4}, ["num_key_value_heads x head_dim 16, not 32"]),
        ({"vocab_size": 1, "intermediate_size": 2}, ["vocab_size 96, not 1;", "intermediate_size 48, not 2;"]),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_shape_is_refused_with_each_field_that_differs(run_dir, changes, fields):
    source = open_source(run_dir / "checkpoints" / "step_4")
    assert model_problems(source, ModelConfig(**PRESET), "step_4") == []
    problems = model_problems(source, ModelConfig(**{**PRESET, **changes}), "step_4")
    assert len(problems) == len(fields)
    for problem, field in zip(problems, fields, strict=True):
        has(problem, "step_4 was made with", field)


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save({**plain_state(), "model.layers.0.moe.gate.weight": torch.zeros(1)}, tmp_path / "w.pt")
    problem = only(model_problems(open_source(tmp_path / "w.pt"), CONFIG, "w.pt"))
    has(problem, "w.pt has, beyond the model, model.layers.0.moe.gate.weight")


def test_what_deepspeed_itself_puts_into_its_files_is_allowed(checkpoint):
    for file in checkpoint.glob("*.pt"):
        safe_load(file)
