"""What a model is evaluated on: the same documents from text and from the corpus that was prepared of it."""

import json

import numpy as np
import pytest
from corpora import write_corpus
from refusals import has, refusal

from megamoe.data import encoder
from megamoe.data.documents import read_set
from megamoe.data.tokenizer import train_tokenizer

TEXTS = [f"The mouse reads map {number}; naïve owls — 😀.\nAnd sing.\n" * (number + 1) for number in range(4)]


@pytest.fixture
def tokenizer():
    return train_tokenizer(TEXTS, 290)


def read(path, tokenizer, text_key="text"):
    return read_set(path, tokenizer, 0, text_key)


def test_text_json_lines_and_prepared_corpora_hold_the_same_documents(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(encoder, "PIECE", 100)  # longer documents are encoded in pieces
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    pairs = [(split, text) for split in ("train", "valid") for text in TEXTS]
    write_corpus(pairs, tokenizer, tmp_path / "corpus")
    found = [
        read(tmp_path / "texts", tokenizer),
        read(tmp_path / "lines.jsonl", tokenizer, "body"),
        *(read(tmp_path / "corpus" / form, tokenizer) for form in ("", "valid", "train", "valid.idx")),
    ]
    for documents in found:
        for number, (document, text) in enumerate(zip(documents, TEXTS, strict=True)):
            assert tokenizer.decode(document.ids.tolist()) == text
            assert document.size == len(text.encode())
            assert np.array_equal(document.ids, found[0][number].ids)
    assert found[0][1].name == str(tmp_path / "texts" / "1.txt")
    assert found[1][1].name == f"{tmp_path / 'lines.jsonl'} #2"
    assert found[2][1].name == f"{tmp_path / 'corpus' / 'valid'} #2"


def test_what_holds_no_documents_of_this_tokenizer_is_refused(tmp_path, tokenizer):
    (tmp_path / "empty.txt").write_text(" \n")
    for name, other in (("other", train_tokenizer(TEXTS, 280)), ("unheld", tokenizer)):
        write_corpus([("train", text) for text in TEXTS], other, tmp_path / name)
    for name, *parts in (
        ("empty.txt", "no document"),
        ("absent", "absent does not exist"),
        ("other/train", "numbers tokens otherwise", "tokenizer.json"),
        ("unheld", "unheld has no held-out split", "--valid_fraction"),
    ):
        has(refusal(read, tmp_path / name, tokenizer), *parts)
