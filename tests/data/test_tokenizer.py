"""Byte-level BPE: any text comes back, END_OF_TEXT is id 0, wrong files are refused."""

import contextlib
import json

import pytest
from refusals import has, refusal
from tokenizers import Tokenizer, models, pre_tokenizers

from megamoe.data.tokenizer import (
    END_OF_TEXT,
    encode,
    end_of_text_id,
    load_tokenizer,
    train_tokenizer,
    vocabulary_of,
)

# GPT-2 and ours, Llama 3, Llama 2 and Mistral, Gemma, ChatML models
END_OF_TEXT_NAMES = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>"]
TEXT = "the grey mouse reads a map; the owl sings of rivers, candles and slow mountains.\n"


@pytest.mark.parametrize("size", [257, 300])
def test_any_text_comes_back_and_none_gives_the_end_of_text(size):
    tokenizer = train_tokenizer([TEXT] * 20, size)
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))
    assert end_of_text_id(tokenizer) == tokenizer.token_to_id(END_OF_TEXT) == 0
    for text in ("", " ", TEXT, "  two before\r\n\n", "".join(map(chr, range(256))), "😀 👩‍👩‍👧‍👦 e\u0301 汉字 \ufffd"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        assert 0 not in ids
    for size in (256, 0, -1):
        has(refusal(train_tokenizer, [TEXT], size), f"vocab_size is {size}", "257", "raise it")


def test_the_vocabulary_reaches_to_the_largest_id_which_no_model_may_lack(tmp_path):
    assert vocabulary_of(Tokenizer(models.BPE())) == 0
    path = tmp_path / "t.json"
    for largest in (96, 40_000):  # some ids have no token
        Tokenizer(models.WordLevel({END_OF_TEXT: 0, "a": 1, "b": largest})).save(str(path))
        assert vocabulary_of(load_tokenizer(path, largest + 1)) == largest + 1
        said = refusal(load_tokenizer, path, largest)
        has(said, str(path), f"id {largest}", f"the model's vocabulary of {largest}", "vocab_size")
    path.write_text(path.read_text().replace("40000", "4294967295"))
    has(refusal(load_tokenizer, path), "id 4294967295", "any model's vocabulary of 16777216")


def without_byte_4():
    described = json.loads(train_tokenizer([TEXT], 257).to_str())
    del described["model"]["vocab"]["\u0104"]
    return Tokenizer.from_str(json.dumps(described))


def with_added(name):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.add_tokens([name])
    return tokenizer


BYTES = [f"<0x{number:02X}>" for number in range(256)]


@pytest.mark.parametrize(
    ("tokenizer", "known", "unknown", "what"),
    [
        (without_byte_4(), "é日", "a\néa\x04 b", r"'\x04' (U+0004), character 3 of line 2"),
        (Tokenizer(models.BPE({"a": 0, "b": 1}, [])), "ab", "ab日b", "'日' (U+65E5), character 3 of line 1"),
        (Tokenizer(models.BPE({"a": 0, "u": 1}, [], unk_token="u", fuse_unk=True)), "a", "a日本", "'日' (U+65E5)"),
        (with_added("<x>"), "a<x>", "a<x>日", "'日' (U+65E5), character 5 of line 1"),
        (Tokenizer(models.BPE()), "", "To be", "'T' (U+0054), character 1 of line 1"),
        (Tokenizer(models.WordLevel({"word": 0})), "word", "another", "'another', character 1 of line 1"),
        (Tokenizer(models.WordLevel({"a": 0, "u": 1}, unk_token="u")), "a u", "a\nno a", "'no', character 1 of line 2"),
        (Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), "a", "a ab", "'ab', character 3"),
        (Tokenizer(models.Unigram([("u", 0.0), ("a", -1.0)], 0, False)), "au", "a日", "'日' (U+65E5), character 2"),
        (Tokenizer(models.Unigram([("a", -1.0)], None, False)), "a", "a日", "'日' (U+65E5), character 2 of line 1"),
    ],
)  # fmt: skip
def test_what_no_token_stands_for_is_refused_by_name_and_place(tokenizer, known, unknown, what):
    if isinstance(tokenizer.model, (models.WordLevel, models.WordPiece)):
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    before = tokenizer.to_str()
    assert encode(tokenizer, [known, known]) == [tokenizer.encode(known).ids] * 2
    with contextlib.suppress(Exception):  # the library keeps the words that it has encoded with losses
        tokenizer.encode(unknown)
    has(refusal(encode, tokenizer, [unknown]), f"no token for {what}", "use a tokenizer that")
    assert tokenizer.to_str() == before


def test_half_of_a_surrogate_pair_is_refused():
    has(refusal(encode, train_tokenizer([TEXT], 257), ["a\ud800"]), "no text", "UTF-8")


def test_bytes_stand_for_what_a_tokenizer_has_no_token_for():
    vocab = dict(zip([*BYTES, "a"], range(257), strict=True))
    unigram = models.Unigram([("<unk>", 0.0), *((text, -1.0) for text in vocab)], 0, True)
    for model, shift in ((models.BPE(vocab, [], byte_fallback=True), 0), (unigram, 1)):
        assert encode(Tokenizer(model), ["a日"]) == [[256 + shift, *(byte + shift for byte in "日".encode())]]


def test_the_end_of_text_is_the_named_one_or_that_of_published_tokenizers():
    named = Tokenizer(models.WordLevel({"word": 0, "<stop>": 3, END_OF_TEXT: 5}))
    assert end_of_text_id(named, "<stop>") == 3
    assert end_of_text_id(named) == 5
    has(refusal(end_of_text_id, named, "<halt>"), '"<halt>"', "name one")
    for name in END_OF_TEXT_NAMES:
        assert end_of_text_id(Tokenizer(models.WordLevel({"word": 0, name: 7}))) == 7
    problem = refusal(end_of_text_id, Tokenizer(models.WordLevel({"word": 0})))
    has(problem, *END_OF_TEXT_NAMES, "name one", "--end_of_text")
