"""From a run to text from llama.cpp."""

import sys
from functools import partial

import pytest
import torch
from ranks import run_ranks
from refusals import has, refusal
from toy import ds_config, train_here, write_inputs

from megamoe.checkpoint.opening import open_model
from megamoe.data.tokenizer import load_tokenizer, train_tokenizer
from megamoe.model.generation import generate

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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two ranks that share the experts of a model with a balancing bias."""
    folder = tmp_path_factory.mktemp("run")
    inputs = write_inputs(folder, ds_config(2), MINIMAX)
    train_tokenizer(["to be or not to be"], 270).save(str(folder / "corpus" / "tokenizer.json"))
    run_ranks(2, train_here, {**inputs, "ep_size": 2, "run_dir": str(folder / "run"), "steps": 3})
    return folder / "run"


@pytest.fixture
def convert(call):
    return partial(call, "convert")


def greedy(run, count):
    model = open_model(run).load(torch.float32, torch.device("cpu"))
    assert all(router.selection_bias.any() for router in model.routers())
    return generate(model, [load_tokenizer(run / "tokenizer.json").encode(PROMPT).ids], count, temperature=0)[0]


def test_a_dry_run_lists_what_llama_cpp_will_find_and_writes_nothing(run, convert, tmp_path):
    lines = convert(run, tmp_path / "m.gguf", "--dtype", "fp16", "--dry-run")
    assert "blk.0.ffn_up_exps.weight  4 x 48 x 32  float16  12,288 bytes" in lines
    assert "blk.1.exp_probs_b.bias  4  float32  16 bytes" in lines
    has(lines[-1], "file 1 of 1")
    assert list(tmp_path.iterdir()) == []


def test_what_gguf_needs_is_said_the_package_included(run, convert, tmp_path, monkeypatch):
    has(refusal(convert, run, tmp_path / "out", "--to", "gguf"), "--to is gguf", f"call it {tmp_path / 'out'}.gguf")
    missing = refusal(convert, run, tmp_path / "m.gguf", "--tokenizer", tmp_path / "none.json")
    has(missing, "none.json does not exist", "tokenizer.json")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "gguf", None)
    for name in [name for name in sys.modules if name.startswith("megamoe.formats.gguf_")]:
        monkeypatch.delitem(sys.modules, name)
    has(refusal(convert, run, tmp_path / "m.gguf"), "needs the package gguf", "pip install")


def test_generate_continues_prompts_with_a_gguf_and_refuses_what_is_no_model(run, call, convert, tmp_path):
    convert(run, tmp_path / "m.gguf")

    continued = partial(call, "generate")
    words = (tmp_path / "m.gguf", "--prompt", PROMPT, "--max_new_tokens", 4, "--temperature", 0)
    model = open_model(run)
    expected = load_tokenizer(model.tokenizer).decode(greedy(run, 4))
    has("\n".join(continued(*words)), f"{PROMPT}{expected}")
    has(refusal(continued, tmp_path / "m.gguf", "--prompt", "to be " * 3000), "llama.cpp does not continue", "shorter")
    for words in (("chat",), ("convert", tmp_path / "hf")):
        has(refusal(call, words[0], tmp_path / "m.gguf", *words[1:]), "m.gguf is for llama.cpp", "megamoe generate")
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    has(refusal(continued, tmp_path / "junk.gguf"), "junk.gguf", "cannot read")
    has(refusal(continued, tmp_path / "none.gguf"), "none.gguf", "is no file")
