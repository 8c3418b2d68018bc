"""Tokenizers in GGUF files: llama.cpp's ids are those of the `tokenizers` library."""

import json

import pytest
import torch
from exported import random_source
from gguf import GGUFReader, TokenType
from llama_cpp import LlamaCpp
from refusals import has, refusal
from test_gguf_file import PUBLISHED, preset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megamoe.data.tokenizer import train_tokenizer
from megamoe.formats.gguf_file import write_gguf
from megamoe.formats.gguf_tokenizer import RULES

TEXT = """HAMLET. To be, or not to be -- that's the question:
\tWhether 'tis nobler in the mind to suffer\r\n\r\nThe slings   and arrows of 1600 or 12345 fortunes, I'LL say;
   \n \n\nnaïve café, cafe\u0301, 東京の猫, “quotes”… 🎭🎭 x\u00a0y\u2003z  they've we'd don't\n\n\n   end   """
PRESET = PUBLISHED["llama"] | {"vocab_size": 400}


def trained(rule, texts, vocab_size=380):
    """A tokenizer of one of llama.cpp's rules."""
    if rule == "gpt-2":
        return train_tokenizer(texts, vocab_size)
    ((regex, ignore_merges),) = [(regex, known.ignore_merges) for regex, known in RULES.items() if known.name == rule]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    options = {"vocab_size": vocab_size, "special_tokens": special, "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, **options))
    return tokenizer


def written(tokenizer, tmp_path, changes=None):
    """A GGUF file with the tokenizer, of which `changes` replace parts of the JSON."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(tokenizer.to_str()), **(changes or {})}))
    config = preset(PRESET)
    write_gguf(random_source(config), tmp_path / "m.gguf", torch.float32, config, path)
    return tmp_path / "m.gguf"


def test_a_published_directory_gives_its_special_tokens_and_its_chat_template(tmp_path):
    tokenizer = trained("gpt-2", [TEXT], 300)
    (tmp_path / "config.json").write_text('{"bos_token_id": 5, "eos_token_id": [7, 8]}')
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    fields = GGUFReader(written(tokenizer, tmp_path)).fields
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 5
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 7
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"


@pytest.mark.parametrize("rule", ["gpt-2", "qwen2", "llama-bpe"])
def test_llama_cpp_tokenises_as_the_library_does(rule, tmp_path):
    tokenizer = trained(rule, [TEXT, "the question of the mind " * 20])
    llama = LlamaCpp(written(tokenizer, tmp_path))
    for text in (TEXT, TEXT[::-1], TEXT.swapcase(), TEXT.replace("\n", " \n"), "1" * 7, " ", "\n\n"):
        assert llama.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids, text
    assert llama.tokenize("be<|endoftext|>") == tokenizer.encode("be<|endoftext|>").ids
    assert llama.tokenize("be<|endoftext|>")[-1] == 0


def test_special_added_and_unused_tokens_are_marked(tmp_path):
    tokenizer = trained("gpt-2", [TEXT], 300)
    tokenizer.add_tokens(["WHENCE"])
    tokenizer.add_special_tokens(["<|user|>"])
    fields = GGUFReader(written(tokenizer, tmp_path)).fields
    types = fields["tokenizer.ggml.token_type"].contents()
    tokens = fields["tokenizer.ggml.tokens"].contents()
    expected = dict.fromkeys(range(400), TokenType.NORMAL)
    expected |= dict.fromkeys(range(302, 400), TokenType.UNUSED)
    expected |= {0: TokenType.CONTROL, 300: TokenType.USER_DEFINED, 301: TokenType.CONTROL}
    assert dict(enumerate(types)) == expected
    assert tokens[:302] == [tokenizer.id_to_token(number) for number in range(302)]
    assert len(set(tokens)) == 400
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path):
    tokenizer, bytes_alone = trained("gpt-2", [TEXT]), {"type": "ByteLevel", "trim_offsets": True}
    model = json.loads(tokenizer.to_str())["model"]
    for changes, words in (
        ({"pre_tokenizer": bytes_alone | {"add_prefix_space": True, "use_regex": True}}, "by another rule"),
        ({"pre_tokenizer": bytes_alone | {"add_prefix_space": False, "use_regex": False}}, "by another rule"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "by another rule"),
        ({"pre_tokenizer": None}, "by another rule"),
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase"),
        ({"model": model | {"ignore_merges": True}}, "has ignore_merges true"),
        ({"model": {"type": "WordLevel", "vocab": {"to": 0, "be": 1}, "unk_token": "to"}}, "is of the kind WordLevel"),
    ):
        has(refusal(written, tokenizer, tmp_path, changes), "tokenizer.json", words, "llama.cpp knows")
    assert not list(tmp_path.glob("*.gguf*"))
    assert written(tokenizer, tmp_path, {"normalizer": {"type": "NFC"}}).exists()
