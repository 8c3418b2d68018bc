"""Tokenizers in the forms in which models are published: one text gives the same ids to megamoe, a corpus, transformers
and llama.cpp, before a run and in what is exported from it."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from corpora import write_corpus
from exported import random_source
from llama_cpp import LlamaCpp
from test_gguf_file import PUBLISHED, preset
from test_gguf_tokenizer import trained
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from megamoe.data.documents import read_set
from megamoe.data.token_files import TokenCorpus, corpus_prefix
from megamoe.data.tokenizer import (
    decode_continuation,
    encode_prompts,
    end_of_text_id,
    end_of_text_of,
    load_tokenizer,
    start_id,
)
from megamoe.formats.gguf_file import write_gguf
from megamoe.formats.tokenizer_files import TOKEN_IDS, write_generation_config, write_tokenizer
from megamoe.run_inputs import tokenizer_files
from megamoe.utils.run_folder import RunFolder

TEXT = "The model has read it, and the café knows 日本 too."
CONFIG = preset(PUBLISHED["llama"] | {"vocab_size": 400})


def template(tokenizer, first):
    step = processors.TemplateProcessing(single=[first, "$A"], special_tokens=[(first, tokenizer.token_to_id(first))])
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), step])


def byte_level(rule, special, first=None):
    tokenizer = trained(rule, [TEXT * 20], 300)
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = template(tokenizer, first) if first else processors.ByteLevel()
    return tokenizer


def sentencepiece(special, first, metaspace=False):
    """As Mixtral's and Gemma's: BPE with a byte for what it does not know, and a space before a text or not."""
    letters = "▁abcdefghijklmnopqrstuvwxyzT.,"
    pieces = [*special, *(f"<0x{number:02X}>" for number in range(256)), *letters, "th", "the"]
    model = models.BPE({piece: number for number, piece in enumerate(pieces)}, [("t", "h"), ("th", "e")])
    model.byte_fallback, model.unk_token, model.fuse_unk = True, special[0], True
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = template(tokenizer, first)
    return tokenizer


@dataclass
class Form:
    tokenizer: Tokenizer
    end: str  # of a document
    first: str | None = None  # before one
    settings: dict = field(default_factory=dict)  # tokenizer_config.json
    ids: dict = field(default_factory=dict)  # of config.json, by tokens
    generation: dict = field(default_factory=dict)


LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
QWEN = ["<|im_start|>", "<|im_end|>"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
OBJECTS = [{"__type": "AddedToken", "content": one, "normalized": True} for one in DEEPSEEK]
CHAT = {"chat_template": "{{ messages[0].content }}"}
FORMS = {
    "gpt2": Form(byte_level("gpt-2", []), "<|endoftext|>"),
    "olmoe": Form(byte_level("gpt-2", ["|||IP|||"]), "|||IP|||", settings={"eos_token": "|||IP|||", "bos_token": None}),
    "llama3": Form(byte_level("llama-bpe", LLAMA, LLAMA[0]), LLAMA[1], LLAMA[0], {"eos_token": LLAMA[1]}),
    "llama3-instruct": Form(
        byte_level("llama-bpe", LLAMA, LLAMA[0]), LLAMA[2], LLAMA[0],
        {"eos_token": LLAMA[2], "bos_token": LLAMA[0], "add_bos_token": False, **CHAT},  # a flag of the past
        generation={"bos_token_id": LLAMA[0], "eos_token_id": LLAMA[1:]},
    ),
    "qwen3": Form(
        byte_level("qwen2", QWEN), QWEN[1], None,
        {"add_bos_token": False, "bos_token": None, "eos_token": QWEN[1], **CHAT},
        {"bos_token_id": "<|endoftext|>", "eos_token_id": QWEN[1]},
        {"pad_token_id": "<|endoftext|>", "eos_token_id": [QWEN[1], "<|endoftext|>"]},
    ),
    "deepseek-v3": Form(
        byte_level("qwen2", DEEPSEEK), DEEPSEEK[1],
        settings={"add_bos_token": True, "bos_token": OBJECTS[0], "eos_token": OBJECTS[1]},
    ),
    "moonlight": Form(byte_level("qwen2", ["[BOS]", "[EOS]"]), "[EOS]", ids={"eos_token_id": "[EOS]"}),
    "minimax-m2": Form(byte_level("gpt-2", ["]~b]", "[e~["]), "[e~[", generation={"eos_token_id": ["[e~["]}),
    "glm-4.5": Form(
        byte_level("llama-bpe", ["[gMASK]", "<|user|>"]), "<|endoftext|>", None,
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, {"eos_token_id": ["<|endoftext|>", "<|user|>"]},
    ),
    "mixtral": Form(sentencepiece(["<unk>", "<s>", "</s>"], "<s>"), "</s>", "<s>", ids={"bos_token_id": "<s>"}),
    "metaspace": Form(sentencepiece(["<unk>", "<bos>", "<eos>"], "<bos>", True), "<eos>", "<bos>"),
    "named": Form(byte_level("gpt-2", ["<halt>"]), "<halt>"),  # by --end_of_text alone
}  # fmt: skip


def numbers(form, tokens):
    number = form.tokenizer.token_to_id
    return {key: [*map(number, one)] if isinstance(one, list) else number(one) for key, one in tokens.items()}


def publish(form, folder):
    """The directory of a model, without weights."""
    folder.mkdir()
    form.tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in (
        ("tokenizer_config", {"tokenizer_class": "PreTrainedTokenizerFast", **form.settings} if form.settings else {}),
        ("config", numbers(form, form.ids)),
        ("generation_config", numbers(form, form.generation)),
    ):
        if values:
            (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def export(tokenizer, out):
    """The ids of special tokens that an export gets."""
    out.mkdir()
    ids = write_tokenizer(out, tokenizer, CONFIG)
    write_generation_config(out, ids)
    return ids


def in_transformers(folder):
    from transformers import AutoTokenizer

    (folder / "config.json").unlink(missing_ok=True)  # of no class that it knows
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", FORMS)
def test_a_published_form_gives_the_same_ids_everywhere_before_a_run_and_after_it(name, tmp_path):
    form = FORMS[name]
    folder, out, corpus = publish(form, tmp_path / "published"), tmp_path / "out", tmp_path / "corpus"
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    (ids,) = encode_prompts(tokenizer, [TEXT])
    first, end = (one and tokenizer.token_to_id(one) for one in (form.first, form.end))
    assert (ids[0] == first) if form.first else (first not in ids)
    assert end_of_text_of(tokenizer) == ("<|endoftext|>" if name == "named" else form.end)

    write_corpus([("train", TEXT), ("valid", TEXT)], tokenizer, corpus, form.end if name == "named" else None)
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    assert (end_of_text_id(tokenizer), start_id(tokenizer)) == (end, first or end)
    (document,) = TokenCorpus(corpus_prefix(str(corpus), "train"), 1, 400).documents()
    assert document.tolist() == [*ids, end]
    (held_out,) = read_set(corpus, tokenizer, end, "text")
    assert held_out.ids.tolist() == ids[1 if form.first else 0 :]

    files = tokenizer_files(corpus / "tokenizer.json", [folder])
    RunFolder(tmp_path / "run").enter({"end_of_text": form.end}, files)
    run = tmp_path / "run/tokenizer.json"
    assert end_of_text_id(load_tokenizer(run)) == end
    assert end in np.atleast_1d(export(run, out)["eos_token_id"])
    for place in (folder, out) if form.settings else (out,):
        theirs = in_transformers(place)
        assert theirs(TEXT).input_ids == ids
        assert place == folder or theirs.eos_token == form.end
        assert theirs.chat_template == form.settings.get("chat_template")
    if name in ("gpt2", "llama3", "qwen3"):
        write_gguf(random_source(CONFIG), tmp_path / "m.gguf", torch.float32, CONFIG, run)
        assert LlamaCpp(tmp_path / "m.gguf").tokenize(TEXT) == ids


@pytest.mark.parametrize("name", FORMS)
def test_a_published_directory_keeps_its_files_and_its_ids_and_so_does_a_run_that_starts_from_it(name, tmp_path):
    form = FORMS[name]
    folder = publish(form, tmp_path / "published")
    ids = export(folder / "tokenizer.json", tmp_path / "direct")
    assert ids == ids | numbers(form, form.generation | form.ids)
    if name == "gpt2":
        assert ids == dict.fromkeys(TOKEN_IDS, 0)
        assert json.loads((tmp_path / "direct/tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    RunFolder(tmp_path / "run").enter({}, tokenizer_files(None, [folder]))
    export(tmp_path / "run/tokenizer.json", tmp_path / "out")
    for file in folder.glob("*.json"):
        for out in (tmp_path / "direct", tmp_path / "out"):
            assert file.name == "config.json" or (out / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", FORMS)
def test_a_continuation_joins_its_prompt_as_the_text_was(name):
    tokenizer = FORMS[name].tokenizer
    for prompt, rest in (("The model", " has read it"), ("日本", " too."), ("The", " model.")):
        (before,), (after,) = encode_prompts(tokenizer, [prompt]), encode_prompts(tokenizer, [prompt + rest])
        assert after[: len(before)] == before
        assert decode_continuation(tokenizer, before, after[len(before) :]) == rest
