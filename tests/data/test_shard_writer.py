"""Documents to shards: every character once, end-of-text between documents, the held-out split."""

import itertools
import random

import numpy as np
import pytest
from corpora import write_corpus
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megamoe.data import encoder, shard_writer
from megamoe.data.selection import split_documents
from megamoe.data.token_files import TokenCorpus
from megamoe.data.tokenizer import END_OF_TEXT, start_id, train_tokenizer

DOCUMENTS = [
    "The mouse unrolls the map.\nIt shows a river, a mill and a bridge.\n",
    "Ünïcode — naïve 😀\r\nand a second line without an end",
    "One short line.\n",
    "\n  Indented after an empty line.\n\n\nThree empty lines before this one.\n",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*DOCUMENTS] * 10, 300)


# --- the held-out split ---


def splits(documents, fraction):
    pairs = list(split_documents(documents, fraction))
    return {name: [text for split, text in pairs if split == name] for name in ("train", "valid")}


def test_every_kth_document_is_held_out():
    for fraction, every, more in ((0.5, 2, 7), (0.25, 4, 1), (0.05, 20, 0), (0.01, 100, 7)):
        documents = [f"document {number}" for number in range(every + more)]
        found = splits(documents, fraction)
        assert found["valid"] == documents[every - 1 :: every]
        assert found["train"] == [text for number, text in enumerate(documents, start=1) if number % every]


def test_train_and_valid_hold_every_character_once_and_in_order():
    draw = random.Random(1)
    for count, fraction in itertools.product((1, 3, 19, 20, 45), (0.05, 0.2, 0.37, 0.5)):
        documents = ["".join(draw.choices("ab \n", k=draw.randrange(40, 90))) + "end" for _ in range(count)]
        pieces = [text for _, text in split_documents(iter(documents), fraction)]
        assert "".join(pieces) == "".join(documents)
    documents = ["".join(f"line {number} of {name}\n" for number in range(100)) for name in "abcdefghi"]
    found = splits(documents, 0.1)  # nine, where every tenth would be held out: the tails are, cut at a line's end
    for kept, held, document in zip(found["train"], found["valid"], documents, strict=True):
        assert kept.endswith("\n")
        assert 0.1 * len(document) - len("line 99 of a\n") < len(held) <= 0.1 * len(document)


def test_a_short_document_or_a_tail_of_empty_lines_is_not_split_into_nothing_and_the_rest():
    for document in ("a", "ab\n", "\n\n\n\nx", "x\n\n\n\n\n\n\n\n\n\n", "line\n" * 10 + "\n" * 20):
        pieces = [text for _, text in split_documents([document], 0.05)]
        assert "".join(pieces) == document
        assert all(text.strip() for text in pieces), pieces


# --- writing ---


def made(documents, tokenizer, out):
    """(token ids of each document, dataset) as DeepSpeed reads what is written; the record."""
    record = write_corpus([("train", text) for text in documents], tokenizer, out)
    dataset = MMapIndexedDataset(str(out / "train-00000"), skip_warmup=True)
    assert dataset.doc_idx.tolist() == list(range(len(documents) + 1))
    return [item.tolist() for item in dataset], dataset, record


def decoded(items, tokenizer):
    """Their texts; checks that end-of-text ends each and stands nowhere else."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert all(tokens.index(end) == len(tokens) - 1 for tokens in items)
    return [tokenizer.decode(tokens[:-1], skip_special_tokens=False) for tokens in items]


def test_a_document_that_names_the_end_of_text_does_not_end_there(tmp_path, tokenizer):
    documents = [f"before {END_OF_TEXT} after", END_OF_TEXT, "plain"]
    assert decoded(made(documents, tokenizer, tmp_path / "out")[0], tokenizer) == documents


@pytest.mark.parametrize("batch", [90, 1 << 20])
def test_long_documents_are_encoded_in_pieces_and_stay_one_document(tmp_path, tokenizer, monkeypatch, batch):
    monkeypatch.setattr(encoder, "PIECE", 40)
    monkeypatch.setattr(shard_writer, "BATCH", batch)
    draw = random.Random(4)
    lines = ["".join(draw.choices("abcdefg \t", k=draw.randrange(30))) for _ in range(60)]
    documents = [
        "short\n",
        "\n".join(lines),
        "\r\n".join(lines) + "\r\n",
        "x" * 300,
        "y" * 41 + "\n",
        "z" * 40 + "\n" + "z" * 40,
    ]
    items, _, record = made(documents, tokenizer, tmp_path / "out")
    assert decoded(items, tokenizer) == documents
    assert record.splits["train"].documents == len(documents)


def test_every_document_begins_with_what_the_tokenizer_puts_before_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "PIECE", 40)
    monkeypatch.setattr(shard_writer, "BATCH", 90)
    tokenizer = train_tokenizer([*DOCUMENTS] * 10, 300)
    tokenizer.add_special_tokens(["<s>", "<b>"])
    first = [("<s>", tokenizer.token_to_id("<s>")), ("<b>", tokenizer.token_to_id("<b>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> <b> $A", special_tokens=first)
    documents = ["a", "one line\n" * 30, *DOCUMENTS, "b"]
    for ids, text in zip(made(documents, tokenizer, tmp_path / "out")[0], documents, strict=True):
        assert ids[:2] == [number for _, number in first]
        assert ids[-1] == tokenizer.token_to_id(END_OF_TEXT)
        assert tokenizer.decode(ids[2:-1], skip_special_tokens=False) == text


@pytest.mark.parametrize("puts", [[], ["<s>"]])
def test_a_document_of_a_sample_begins_with_the_token_that_a_prompt_begins_with(tmp_path, puts):
    tokenizer = train_tokenizer([*DOCUMENTS] * 10, 300)
    tokenizer.add_special_tokens(["<s>"])
    if puts:
        special = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    write_corpus([("train", text) for text in DOCUMENTS * 3], tokenizer, tmp_path / "out")
    corpus = TokenCorpus(tmp_path / "out" / "train", 40, 301)
    samples = [corpus.sample(index) for index in range(corpus.num_samples)]
    begun = [int(one.ids[start]) for one in samples for start in one.starts]
    assert len(begun) > 5
    assert set(begun) == {start_id(tokenizer)} == {tokenizer.token_to_id(puts[0] if puts else END_OF_TEXT)}


def words_tokenizer(size):
    made_tokenizer = Tokenizer(models.WordLevel({END_OF_TEXT: 0, **{f"w{i}": i for i in range(1, size)}}))
    made_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return made_tokenizer


@pytest.mark.parametrize(("size", "dtype"), [(32768, np.int16), (65537, np.int32)])
def test_the_largest_id_of_a_vocabulary_fits_its_token_type(tmp_path, size, dtype):
    items, dataset, _ = made([f"w1 w{size - 1}"], words_tokenizer(size), tmp_path / "out")
    assert items == [[1, size - 1, 0]]
    assert dataset.dtype == dtype
