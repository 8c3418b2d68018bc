"""Byte-level BPE: any text comes back, END_OF_TEXT is id 0, wrong files are refused."""

import json
import random

import pytest
from tokenizers import Tokenizer, models

from megamoe.data.tokenizer import (
    END_OF_TEXT,
    encode,
    end_of_text_id,
    load_tokenizer,
    tokenizer_file,
    train_tokenizer,
    vocabulary_of,
)
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


def test_a_folder_stands_for_the_tokenizer_in_it(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_file(tmp_path) == tokenizer_file(tmp_path / "tokenizer.json") == tmp_path / "tokenizer.json"
    assert load_tokenizer(tokenizer_file(tmp_path)).to_str() == tokenizer.to_str()
    assert "tokenizer.json does not exist" in refusal(load_tokenizer, tokenizer_file(tmp_path.parent))


def with_ids(path, **ids):
    Tokenizer(models.WordLevel({END_OF_TEXT: 0, **ids})).save(str(path))
    return path


def test_the_vocabulary_reaches_to_the_largest_id_though_some_have_no_token(tmp_path):
    assert vocabulary_of(load_tokenizer(with_ids(tmp_path / "t.json", a=1, z=40_000))) == 40_001
    assert vocabulary_of(Tokenizer(models.BPE())) == 0


def test_ids_beyond_the_models_vocabulary_or_any_are_refused(tmp_path):
    path = with_ids(tmp_path / "t.json", a=95, b=96)
    assert load_tokenizer(path, 97)
    problem = refusal(load_tokenizer, path, 96)
    assert all(part in problem for part in (str(path), "id 96", "the model's vocabulary of 96", "vocab_size"))
    saved = json.loads(path.read_text())
    saved["model"]["vocab"]["b"] = 2**32 - 1
    path.write_text(json.dumps(saved))
    problem = refusal(load_tokenizer, path)
    assert all(part in problem for part in ("id 4294967295", "any model's vocabulary of 16777216"))


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    ],
)
def test_a_tokenizer_that_the_library_breaks_down_over_is_refused(tokenizer, tmp_path, change):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(tokenizer.to_str()), **change}))
    assert "cannot be read" in refusal(load_tokenizer, path)


def test_a_text_with_a_word_that_the_tokenizer_lacks_is_refused():
    bare = Tokenizer(models.WordLevel({"word": 0}))
    assert encode(bare, ["word", "word"]) == [[0], [0]]
    assert "cannot encode the text" in refusal(encode, bare, ["word", "another"])


def test_the_end_of_text_can_be_named(tokenizer):
    named = Tokenizer(models.WordLevel({"word": 0, "<stop>": 3, END_OF_TEXT: 5}))
    assert end_of_text_id(named, "<stop>") == 3
    assert end_of_text_id(named) == 5
    problem = refusal(end_of_text_id, named, "<halt>")
    assert '"<halt>"' in problem
    assert "name one" in problem


@pytest.mark.parametrize("name", END_OF_TEXT_NAMES)
def test_the_end_of_text_of_published_tokenizers_is_found(name):
    assert end_of_text_id(Tokenizer(models.WordLevel({"word": 0, name: 7}))) == 7


def test_a_tokenizer_without_end_of_text_is_refused():
    problem = refusal(end_of_text_id, Tokenizer(models.WordLevel({"word": 0})))
    assert all(name in problem for name in END_OF_TEXT_NAMES)
    assert "--end_of_text" in problem
    assert "add one" in problem
