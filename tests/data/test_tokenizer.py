"""Byte-level BPE: any text comes back, END_OF_TEXT is id 0, wrong files are refused."""

import random

import pytest
from tokenizers import Tokenizer, models

from megamoe.data.tokenizer import END_OF_TEXT, end_of_text_id, load_tokenizer, train_tokenizer
from megamoe.errors import UserError

# GPT-2 and ours, Llama 3, Llama 2 and Mistral, Gemma, ChatML models
END_OF_TEXT_NAMES = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>"]
TEXT = "the grey mouse reads a map; the owl sings of rivers, candles and slow mountains.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 20, 300)


def refusal(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    (problem,) = caught.value.problems
    assert problem.endswith(".")
    return problem


def roundtrip(tokenizer, text):
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        TEXT,
        "  two before, two after  ",
        "one\r\ntwo\rthree\n\n\n",
        "tab\tvertical\vform\f",
        "".join(map(chr, range(32))) + "\x7f\x85\u2028\u2029\ufeff",
        "smile 😀, family 👩‍👩‍👧‍👦, flag 🇨🇭, tone 👍🏽",
        "e\u0301 is not é; ﬁ is not fi; Å is not Å",
        "汉字 עברית العربية ไทย \u202eturned",
        "\U0010ffff\ue000\ufffd",
        "a" * 5000,
    ],
)
def test_any_text_comes_back(tokenizer, text):
    assert roundtrip(tokenizer, text) == text


def test_random_bytes_read_as_text_come_back(tokenizer):
    draw = random.Random(1)
    for _ in range(200):
        text = draw.randbytes(draw.randrange(100)).decode("utf-8", errors="replace")
        assert roundtrip(tokenizer, text) == text


def test_random_code_points_come_back(tokenizer):
    draw = random.Random(2)
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for _ in range(100):
        text = "".join(map(chr, draw.choices(points, k=50)))
        assert roundtrip(tokenizer, text) == text


def test_end_of_text_is_id_0_and_no_text_gives_it(tokenizer):
    assert end_of_text_id(tokenizer) == tokenizer.token_to_id(END_OF_TEXT) == 0
    assert 0 not in tokenizer.encode(TEXT + "".join(map(chr, range(256)))).ids


def test_the_vocabulary_has_the_size_asked_for(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert sorted(tokenizer.get_vocab().values()) == list(range(300))


def test_a_small_corpus_gives_fewer_entries():
    assert train_tokenizer(["ab"], 1000).get_vocab_size() == 258  # 256 bytes, end-of-text and "ab"


def test_training_makes_text_shorter(tokenizer):
    assert len(tokenizer.encode(TEXT).ids) < len(TEXT.encode()) / 2


def test_the_same_text_trains_the_same_tokenizer(tokenizer):
    assert train_tokenizer([TEXT] * 20, 300).to_str() == tokenizer.to_str()


def test_a_vocabulary_below_the_bytes_and_end_of_text_is_refused():
    for size in (256, 0, -1):
        problem = refusal(train_tokenizer, [TEXT], size)
        assert f"vocab_size is {size}" in problem
        assert "257" in problem
        assert "raise it" in problem
    assert roundtrip(train_tokenizer([TEXT], 257), TEXT + "\0😀") == TEXT + "\0😀"


def test_a_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").to_str() == tokenizer.to_str()


def test_a_missing_tokenizer_is_refused(tmp_path):
    for path in (tmp_path / "no.json", tmp_path):
        problem = refusal(load_tokenizer, path)
        assert str(path) in problem
        assert "tokenizer.json" in problem


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"a": 1}', b"\xff\xfe"])
def test_a_broken_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    problem = refusal(load_tokenizer, path)
    assert str(path) in problem
    assert "cannot be read" in problem


@pytest.mark.parametrize("name", END_OF_TEXT_NAMES)
def test_the_end_of_text_of_published_tokenizers_is_found(name):
    assert end_of_text_id(Tokenizer(models.WordLevel({"word": 0, name: 7}))) == 7


def test_a_tokenizer_without_end_of_text_is_refused():
    problem = refusal(end_of_text_id, Tokenizer(models.WordLevel({"word": 0})))
    assert all(name in problem for name in END_OF_TEXT_NAMES)
    assert "add one" in problem
