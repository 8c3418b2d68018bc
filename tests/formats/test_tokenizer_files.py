"""Tokenizers that go along with a model: a published directory's files and ids, or what a tokenizer.json tells."""

import json

import pytest
from tokenizers import Tokenizer
from toy import PRESET

from megamoe.config.model import ModelConfig
from megamoe.data.tokenizer import train_tokenizer
from megamoe.formats.tokenizer_files import special_ids, write_generation_config, write_tokenizer

CONFIG = ModelConfig(**{**PRESET, "vocab_size": 300})


@pytest.fixture
def published(tmp_path):
    """A tokenizer.json in a directory as it is published, with special tokens of its own."""
    folder = tmp_path / "published"
    folder.mkdir()
    train_tokenizer(["to be or not to be"], 260).save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[begin]", "<|user|>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "[begin]",
        "eos_token": "<|end|>",
        "chat_template": "{{ messages[0].content }}<|end|>",
    }
    begin, user, end = map(tokenizer.token_to_id, ("[begin]", "<|user|>", "<|end|>"))
    ids = {"bos_token_id": begin, "eos_token_id": [end, user]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({**ids, "pad_token_id": None}))
    (folder / "generation_config.json").write_text(json.dumps({**ids, "temperature": 0.6}))
    return folder / "tokenizer.json", ids


def test_a_published_directory_keeps_its_files_its_ids_and_its_chat_template(published, tmp_path):
    from transformers import AutoTokenizer

    tokenizer, ids = published
    out = tmp_path / "out"
    out.mkdir()
    assert write_tokenizer(out, tokenizer, CONFIG) == special_ids(tokenizer, CONFIG) == ids
    write_generation_config(out, ids)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tokenizer.parent / name).read_bytes()
    loaded = AutoTokenizer.from_pretrained(out)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (ids["bos_token_id"], ids["eos_token_id"][0])
    assert loaded.apply_chat_template([{"role": "user", "content": "to be"}], tokenize=False) == "to be<|end|>"


def test_a_tokenizer_alone_ends_a_text_by_its_end_of_text_token(tmp_path):
    train_tokenizer(["to be or not to be"], 270).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    ids = write_tokenizer(tmp_path / "out", tmp_path / "tokenizer.json", CONFIG)
    assert ids == dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
