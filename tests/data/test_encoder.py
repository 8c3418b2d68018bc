"""The fast encoder gives what `tokenizers` gives, or is not used."""

import random
import sys
from types import SimpleNamespace

import fastokens
import numpy as np
import pytest
from refusals import has, refusal
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megamoe.data import encoder
from megamoe.data.encoder import ODD_TEXTS, Encoder, compare
from megamoe.data.tokenizer import END_OF_TEXT, train_tokenizer

TEXTS = ["The mouse unrolls the map.\nIt shows a river, a mill.\n", "Ünïcode — naïve 😀", f"a {END_OF_TEXT} b", ""]


def byte_level(pre_tokenizer, normalizer=None, alphabet=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    options = {"special_tokens": [END_OF_TEXT, "<x>"], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(TEXTS * 9, trainers.BpeTrainer(vocab_size=400, **options))
    return tokenizer


LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer"),
    [(PLAIN, None), (pre_tokenizers.Sequence([LLAMA, LETTERS]), None), (PLAIN, normalizers.NFC())],
)
def test_both_encoders_give_the_same_ids_and_counts(pre_tokenizer, normalizer):
    tokenizer = byte_level(pre_tokenizer, normalizer)
    draw = random.Random(4)
    odd = ["".join(chr(draw.randrange(0xD800)) for _ in range(draw.randrange(30))) for _ in range(200)]
    assert compare(tokenizer, odd) is None
    texts = [*TEXTS, *odd, *ODD_TEXTS]
    (ids, counts), plain = Encoder(tokenizer, is_fast=True)(texts), Encoder(tokenizer)(texts)
    np.testing.assert_array_equal(ids, plain[0])
    np.testing.assert_array_equal(counts, plain[1])
    assert tokenizer.token_to_id(END_OF_TEXT) not in ids


def test_a_tokenizer_that_may_lose_text_is_encoded_fast_only_where_it_does_not(monkeypatch):
    tokenizer = byte_level(PLAIN, alphabet=[letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter != "Ą"])
    assert tokenizer.token_to_id("Ą") is None  # the letter of byte 4
    fast = Encoder(tokenizer, is_fast=True)
    calls = []
    monkeypatch.setattr(encoder, "encode", lambda tokenizer, texts: calls.append(texts) or [[0]])
    fast(["plain text"])
    fast(["plain", "a\4b"])
    assert calls == [["plain", "a\4b"]]


def test_what_fastokens_does_not_take_or_gets_wrong_is_said(monkeypatch):
    words = Tokenizer(models.WordLevel({END_OF_TEXT: 0, "a": 1}))
    has(compare(words, TEXTS), "no byte-level BPE")
    odd = byte_level(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), LETTERS]))
    has(compare(odd, TEXTS), "does not take the tokenizer", "Whitespace")

    good, other = train_tokenizer(TEXTS, 300), train_tokenizer(TEXTS * 2, 290)

    wrong = fastokens.Tokenizer.from_json_str(other.to_str())
    monkeypatch.setattr(fastokens, "Tokenizer", SimpleNamespace(from_json_str=lambda text: wrong))
    has(compare(good, TEXTS), "differ from those of tokenizers", "'The mouse")
    monkeypatch.setitem(sys.modules, "fastokens", None)
    has(refusal(Encoder, good, True), "not installed", "megamoe[fast]")
