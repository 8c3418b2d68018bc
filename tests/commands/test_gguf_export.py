"""From a run to text from llama.cpp."""

import sys
from functools import partial

import pytest
import torch
from llama_cpp import LlamaCpp
from ranks import run_ranks
from refusals import has, refusal, refusals
from toy import ds_config, train_here, write_inputs

from megamoe.checkpoint.open_model import open_model
from megamoe.checkpoint.opening import find_checkpoint, open_source, run_record
from megamoe.commands import convert_checkpoint, generate_gguf
from megamoe.config.model import ModelConfig
from megamoe.data.tokenizer import load_tokenizer, train_tokenizer
from megamoe.formats.source import load_weights
from megamoe.model.decoder import Decoder

MINIMAX = {
    "vocab_size": 300,
    "gated_mlp": True,
    "num_latent_tokens": 0,
    "router_score": "sigmoid",
    "qk_norm": "full",
    "tie_word_embeddings": False,
    "router_bias_rate": 0.05,
}
PROMPT = "to be or not"


def train(folder, preset):
    inputs = write_inputs(folder, ds_config(2), preset)
    train_tokenizer(["to be or not to be"], 270).save(str(folder / "corpus" / "tokenizer.json"))
    run_ranks(2, train_here, {**inputs, "ep_size": 2, "run_dir": str(folder / "run"), "steps": 3})
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two ranks that share the experts of a model with a balancing bias."""
    return train(tmp_path_factory.mktemp("run"), MINIMAX)


@pytest.fixture
def convert(call):
    return partial(call, convert_checkpoint)


@torch.no_grad()
def greedy(run, count):
    checkpoint = find_checkpoint(run)
    source, tokenizer = open_source(checkpoint), load_tokenizer(run / "tokenizer.json")
    assert all(bias.any() for name, bias in source.buffers.items() if name.endswith("selection_bias"))
    model = Decoder(ModelConfig(**run_record(checkpoint)["model"])).eval()
    load_weights(model, source, torch.float32)
    prompt = tokenizer.encode(PROMPT).ids
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_llama_cpp_continues_a_text_as_the_trained_model_does(run, convert, tmp_path):
    architecture, line = convert(run, tmp_path / "m.gguf")
    assert architecture == "llama.cpp's architecture is minimax-m2"
    has(line, f"wrote {tmp_path / 'm.gguf'} from {run / 'checkpoints' / 'step_3'} in ")
    assert LlamaCpp(tmp_path / "m.gguf").greedy(PROMPT, 12) == greedy(run, 12)


def test_a_dry_run_lists_what_llama_cpp_will_find_and_writes_nothing(run, convert, tmp_path):
    lines = convert(run, tmp_path / "m.gguf", "--dtype", "fp16", "--dry-run")
    assert "blk.0.ffn_up_exps.weight  4 x 48 x 32  float16  12,288 bytes" in lines
    assert "blk.1.exp_probs_b.bias  4  float32  16 bytes" in lines
    has(lines[-1], "file 1 of 1")
    assert list(tmp_path.iterdir()) == []


def test_what_gguf_needs_is_said(run, convert, tmp_path):
    has(refusal(convert, run, tmp_path / "out", "--to", "gguf"), "--to is gguf", f"call it {tmp_path / 'out'}.gguf")
    has(refusal(convert, run, tmp_path / "m.gguf", "--to", "huggingface"), "ends in .gguf")
    missing = refusal(convert, run, tmp_path / "m.gguf", "--tokenizer", tmp_path / "none.json")
    has(missing, "none.json does not exist", "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_extra_is_named(run, convert, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for name in [name for name in sys.modules if name.startswith("megamoe.formats.gguf_")]:
        monkeypatch.delitem(sys.modules, name)
    has(refusal(convert, run, tmp_path / "m.gguf"), "needs the package gguf", "pip install")


def test_a_model_that_no_architecture_holds_is_refused_by_its_fields(convert, tmp_path):
    run = train(tmp_path, {"vocab_size": 300})
    said = refusals(convert, run, tmp_path / "m.gguf")
    has("\n".join(said), "num_latent_tokens is 3", "gated_mlp is false", "--to huggingface")
    assert not list(tmp_path.glob("m.gguf*"))


def test_generate_gguf_continues_prompts_and_refuses_what_is_no_model(run, call, convert, tmp_path):
    convert(run, tmp_path / "m.gguf")

    generate = partial(call, generate_gguf)
    words = (tmp_path / "m.gguf", "--prompt", PROMPT, "--max_new_tokens", 4, "--temperature", 0)
    model = open_model(run)
    expected = load_tokenizer(model.tokenizer).decode(greedy(run, 4))
    has("\n".join(generate(*words)), f"{PROMPT}{expected}")
    has(refusal(generate, tmp_path / "m.gguf", "--prompt", "to be " * 3000), "llama.cpp does not continue", "shorter")
    wrong = ("--max_new_tokens", -3, "--temperature", -1, "--seed", -1)
    has("\n".join(refusals(generate, tmp_path / "m.gguf", *wrong)), "max_new_tokens is -3", "temperature is -1", "seed")
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    has(refusal(generate, tmp_path / "junk.gguf"), "junk.gguf", "cannot read")
    has(refusal(generate, tmp_path / "none.gguf"), "none.gguf", "is no file")
