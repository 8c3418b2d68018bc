"""The command-line programs around checkpoints."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from indexed import Malicious
from ranks import run_ranks
from refusals import has, only, refusal
from tokenizers import Tokenizer
from toy import PRESET, ds_config, train_here, write_inputs

from megamoe.checkpoint import verify
from megamoe.checkpoint.opening import OpenModel, open_source
from megamoe.commands import generate, inspect, models
from megamoe.config.model import ModelConfig
from megamoe.data.tokenizer import train_tokenizer
from megamoe.formats.export import write_state_dict
from megamoe.formats.source import load_weights
from megamoe.model.costs import parameter_count, parameter_shapes
from megamoe.model.decoder import Decoder

CONFIG = ModelConfig(**{**PRESET, "vocab_size": 300})


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of two ranks that share each layer's experts, saved at steps 2 and 4, and the inputs it had."""
    folder = tmp_path_factory.mktemp("run")
    inputs = write_inputs(folder, ds_config(2), {"vocab_size": 300})
    train_tokenizer(["to be or not to be"], 270).save(str(folder / "corpus" / "tokenizer.json"))
    run = {**inputs, "ep_size": 2, "save_interval": 2, "run_dir": str(folder / "run")}
    run_ranks(2, train_here, {**run, "steps": 4})
    return folder / "run", run


@pytest.fixture
def run_dir(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run[0], tmp_path / "run"))


# --- convert --------------------------------------------------------------------------------------------------------


def test_the_ending_or_the_flag_chooses_the_form_of_a_run_of_a_folder_of_checkpoints_or_of_one(call, run_dir, tmp_path):
    for place, words, form in (
        ("", ["w.pt"], {"w.pt"}),
        ("checkpoints", ["w.safetensors"], {"w.safetensors"}),
        ("checkpoints/step_2", ["half", "--to", "safetensors", "--dtype", "fp16"], {"model.safetensors"}),
        (
            "",
            ["w", "--max_shard_gb", "0.0001", "--tokenizer", str(run_dir)],
            {"config.json", "model.safetensors.index.json", "tokenizer.json"},
        ),
    ):
        out, step = tmp_path / words[0], "step_2" if place.endswith("2") else "step_4"
        said = call("convert", run_dir / place, out, *words[1:])
        assert said[-1].startswith(f"wrote {out} from {run_dir / 'checkpoints' / step} in ")
        masters = open_source(run_dir / "checkpoints" / step)
        assert form <= {path.name for path in (out.iterdir() if out.is_dir() else [out])}
        dtype, source = torch.float16 if "fp16" in words else torch.float32, open_source(out)
        for name, shape in masters.shapes.items():
            found, master = (one.read(name, "fp32", 0, math.prod(shape)) for one in (source, masters))
            assert torch.equal(found, master.to(dtype).float())


def test_a_dry_run_lists_every_tensor_with_its_bytes_and_writes_nothing(call, run_dir, tmp_path):
    lines = call("convert", run_dir, tmp_path / "w", "--dry-run", "--dtype", "bf16", "--max_shard_gb", "2e-5")
    said, *lines = lines
    has(said, "no class of transformers holds the model: Mixtral", "num_latent_tokens 3", "gated_mlp false")
    tensors = [line for line in lines if not line.startswith("file ")]
    config = CONFIG
    assert "model.embed_tokens.weight  300 x 32  bfloat16  19,200 bytes" in tensors
    assert len(tensors) == len(parameter_shapes(config)) + 2 * config.num_hidden_layers
    said = sum(int(line.split()[-2].replace(",", "")) for line in tensors)
    assert said == 2 * parameter_count(config) + 4 * 4 * 2 * config.num_hidden_layers
    assert sum(line.startswith("file ") for line in lines) > 2
    assert not (tmp_path / "w").exists()


def test_a_wrong_call_of_convert_is_refused_and_writes_nothing(call, run_dir, tmp_path):
    for words, parts in (
        (["w.pt", "--to", "safetensors"], ["ends in .pt"]),
        (["w", "--to", "state_dict"], ["w.pt"]),
        (["w.pt", "--preset", "tiny"], ["--preset", "form state_dict", "leave it out"]),
        (["w.safetensors", "--tokenizer", "/nowhere"], ["--tokenizer", "form safetensors"]),
        (["w.pt", "--max_shard_gb", "1"], ["--max_shard_gb", "form state_dict"]),
        (["w.gguf", "--keep_mtp"], ["--keep_mtp", "form gguf"]),
        (["w", "--keep_mtp"], ["no multi-token prediction", "leave --keep_mtp out"]),
        (["run"], ["exists already"]),
        (["w", "--tokenizer", "none.json"], ["none.json does not exist"]),
    ):
        has(refusal(call, "convert", run_dir, tmp_path / words[0], *words[1:]), *parts)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- the script in every checkpoint -----------------------------------------------------------------------------


def test_the_script_in_every_checkpoint_makes_the_state_dict_that_the_tool_makes(call, run_dir, tmp_path):
    call("convert", run_dir, tmp_path / "tool.pt")
    script = run_dir / "checkpoints" / "step_4" / "zero_to_fp32.py"
    for words, code in (["a.pt"], 0), (["folder"], 2):
        done = subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    has(done.stderr, "call it folder.pt")
    own, tool = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "tool.pt"))
    assert own.keys() == tool.keys()
    assert all(torch.equal(tensor, tool[name]) for name, tensor in own.items())
    assert verify.problems(script.parent) == []  # running it has left nothing there


def test_the_script_says_what_it_needs_where_megamoe_is_not_installed(run_dir):
    script = run_dir / "checkpoints" / "step_4" / "zero_to_fp32.py"
    done = subprocess.run([sys.executable, "-S", "-I", script, "x.pt"], capture_output=True, text=True)
    assert done.returncode == 2
    has(only(done.stderr.splitlines()), "error: No module named 'megamoe'", "install megamoe")


# --- reshard --------------------------------------------------------------------------------------------------------


def test_a_resharded_run_goes_on_where_the_old_one_would(call, finished_run, run_dir, tmp_path):
    (line,) = call("reshard", run_dir, tmp_path / "new")
    has(line, "saved by 2 ranks at ep_size 2")
    _, run = finished_run
    more = {**run, "steps": 8, "resume": True}
    old = run_ranks(2, train_here, {**more, "run_dir": str(run_dir)})[0]
    new = run_ranks(2, train_here, {**more, "run_dir": str(tmp_path / "new")})[0]
    assert [record["loss"] for record in new["train"]] == [record["loss"] for record in old["train"][4:]]
    assert (tmp_path / "new" / "checkpoints" / "latest_universal").read_text() == "step_4"
    has(refusal(call, "reshard", run_dir, tmp_path / "new"), "exists already")
    again = tmp_path / "new" / "checkpoints" / "step_4"
    has(refusal(call, "reshard", again, tmp_path / "newer"), "nothing to reshard")


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspecting_says_topology_step_sizes_verification_and_the_norm_of_each_expert(call, run_dir, tmp_path):
    lines = call("inspect", run_dir)
    text = "\n".join(lines)
    checkpoint = run_dir / "checkpoints" / "step_4"
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    count = parameter_count(CONFIG)
    has(text, str(checkpoint), f"size: {size:,} bytes", "files: verified", "2 ranks, ep_size 2, ZeRO-2", "step: 4 (0")
    has(text, f"parameters: {count:,}", "2 x rank_N.safetensors", "deepspeed 0.")
    model = Decoder(CONFIG)
    load_weights(model, open_source(checkpoint), torch.float64)
    for layer, moe in enumerate(model.moe_layers()):
        norms = torch.cat([weight.flatten(1) for weight in moe.experts.parameters()], dim=1).norm(dim=1).tolist()
        (row,) = [line for line in lines if f"model.layers.{layer}.moe" in line]
        assert row.split()[1:] == [f"{norm:.3f}" for norm in norms]


def test_inspecting_lists_what_each_step_read_after_the_data_was_replaced_too(capsys):
    def phase(first, path):
        corpus = {"path": path, "fingerprint": "f"}
        return {"first_step": first, "samples_per_step": 4, "seq_len": 8, "data": [corpus]}

    before = {"last_step": 6, "phases": [phase(1, "a"), phase(5, "b"), phase(7, "never")]}
    inspect.print_history({"replaced_data": [before], "phases": [phase(1, "c"), phase(9, "d")]})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"data from step {step} on, 4 x 8: {path}, f" for step, path in ((1, "a"), (5, "b"), (7, "c"), (9, "d"))
    ]


def test_inspecting_a_damaged_checkpoint_says_so_first(call, run_dir, capsys):
    path = run_dir / "checkpoints" / "step_4" / "zero_to_fp32.py"
    path.write_text("import os")
    has(refusal(call, "inspect", run_dir), str(path), "has not the bytes")
    assert "files: DAMAGED" in capsys.readouterr().out
    has(refusal(call, "inspect", run_dir / "none"), "none does not exist")


def test_inspecting_takes_plain_weights_and_the_universal_layout_and_finds_code_in_any_file_of_it(
    call, run_dir, tmp_path
):
    write_state_dict(open_source(run_dir / "checkpoints" / "step_4"), tmp_path / "w.pt", torch.float32)
    call("reshard", run_dir, tmp_path / "new")
    whole = call("inspect", run_dir)
    for path, says in ((tmp_path / "w.pt", "weights alone"), (tmp_path / "new", "Universal layout")):
        lines = call("inspect", path)
        has("\n".join(lines), says)
        assert "size: 0 bytes" not in lines
        assert [line for line in lines if "experts  " in line] == [line for line in whole if "experts  " in line]
    checkpoint = tmp_path / "new" / "checkpoints" / "step_4"
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "run.json").unlink()
    (tmp_path / "new" / "run.json").unlink()  # as DeepSpeed alone leaves one
    lines = call("inspect", tmp_path / "new")
    has("\n".join(lines), "files: safe to open; nothing says what bytes they should have")
    pieces = [sorted(checkpoint.glob(f"zero/*/{name}.pt"))[-1] for name in ("fp32", "exp_avg", "step")]
    for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("zero/*.pt"), *pieces]:
        clean = path.read_bytes()
        torch.save({"param": torch.zeros(1), "more": Malicious(tmp_path / "mark")}, path)
        has(refusal(call, "inspect", checkpoint), str(path), "system", "do not open it")
        assert not (tmp_path / "mark").exists()
        path.write_bytes(clean)
    has(refusal(call, "convert", checkpoint, tmp_path / "hf"), "does not say what model", "preset")


# --- generate -------------------------------------------------------------------------------------------------------


def test_generation_uses_the_newest_checkpoint_that_holds(call, run_dir):
    words = ("generate", run_dir, "--prompt", "to be", "--max_new_tokens", "4")
    text = call(*words)
    assert len(text) >= 2
    (run_dir / "checkpoints" / "step_4" / "zero_to_fp32.py").write_text("")
    assert call(*words)[0].startswith("passed over")
    shutil.rmtree(run_dir / "checkpoints")
    has(refusal(call, *words), "holds no checkpoint yet")


def test_generation_computes_in_the_dtype_that_is_chosen_for_the_saved_one(call, run_dir, monkeypatch):
    choices = {torch.float32: torch.bfloat16}  # a choice that nothing else would make
    monkeypatch.setattr(models, "dtype_to_compute_in", lambda saved, device: choices[saved])
    seen = []
    monkeypatch.setattr(generate, "continue_ids", lambda model, ids, *_, **__: seen.append(model) or ids)
    call("generate", run_dir, "--prompt", "to be")
    assert only(seen).embed_tokens.weight.dtype == torch.bfloat16


def test_a_tokenizer_that_does_not_fit_the_model_is_refused_before_the_model_is_built(
    call, run_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(OpenModel, "load", None)
    train_tokenizer(["to be or not to be, that is the question"] * 9, 320).save(str(tmp_path / "tokenizer.json"))
    large = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    large.add_tokens([f"word{number}" for number in range(60)])
    large.save(str(tmp_path / "tokenizer.json"))
    has(refusal(call, "generate", run_dir, "--tokenizer", tmp_path), "tokenizer.json", "the model's vocabulary of 300")
    has(refusal(call, "generate", run_dir, "--end_of_text", "<halt>"), '"<halt>"')
