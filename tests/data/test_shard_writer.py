"""Documents to shards, as DeepSpeed reads them: each is there to its last character, end-of-text between them."""

import random

import numpy as np
import pytest
from corpora import write_corpus
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megamoe.data import encoder, shard_writer
from megamoe.data.token_files import TokenCorpus
from megamoe.data.tokenizer import END_OF_TEXT, start_id, train_tokenizer

DOCUMENTS = [
    "The mouse unrolls the map.\nIt shows a river, a mill and a bridge.\n",
    "Ünïcode — naïve 😀\r\nand a second line without an end",
    f"before {END_OF_TEXT} after",
    END_OF_TEXT,
    "one line\n" * 30,
    "x" * 300,
    "y" * 41 + "\n",
    "z" * 40 + "\n" + "z" * 40,
    *("".join(random.Random(seed).choices("abcdefg \t\r\n", k=400)) for seed in range(3)),
]


def tokenizer_with(prefix):
    """A tokenizer that puts these tokens before a text."""
    tokenizer = train_tokenizer(DOCUMENTS, 300)
    tokenizer.add_special_tokens(prefix)
    special = [(name, tokenizer.token_to_id(name)) for name in prefix]
    tokenizer.post_processor = processors.TemplateProcessing(single=[*prefix, "$A"], special_tokens=special)
    return tokenizer


def made(documents, tokenizer, out):
    record = write_corpus([("train", text) for text in documents], tokenizer, out)
    dataset = MMapIndexedDataset(str(out / "train-00000"), skip_warmup=True)
    assert dataset.doc_idx.tolist() == list(range(len(documents) + 1))
    assert record.splits["train"].documents == len(documents)
    return dataset


@pytest.mark.parametrize(("piece", "batch"), [(40, 90), (40, 1 << 20), (1 << 20, 1 << 20)])
@pytest.mark.parametrize("prefix", [[], ["<s>", "<b>"]])
def test_a_document_is_one_text_between_prefix_and_end_though_it_is_encoded_in_pieces(
    tmp_path, monkeypatch, piece, batch, prefix
):
    monkeypatch.setattr(encoder, "PIECE", piece)
    monkeypatch.setattr(shard_writer, "BATCH", batch)
    tokenizer = tokenizer_with(prefix)
    for ids, text in zip(made(DOCUMENTS, tokenizer, tmp_path / "out"), DOCUMENTS, strict=True):
        assert ids[: len(prefix)].tolist() == [tokenizer.token_to_id(name) for name in prefix]
        assert np.flatnonzero(ids == 0).tolist() == [len(ids) - 1]  # the name of a special token in a text is none
        assert tokenizer.decode(ids[len(prefix) : -1].tolist(), skip_special_tokens=False) == text


@pytest.mark.parametrize("puts", [[], ["<s>"]])
def test_a_document_of_a_sample_begins_with_the_token_that_a_prompt_begins_with(tmp_path, puts):
    tokenizer = tokenizer_with(puts)
    write_corpus([("train", text) for text in DOCUMENTS * 3], tokenizer, tmp_path / "out")
    corpus = TokenCorpus(tmp_path / "out" / "train", 40, 301)
    samples = [corpus.sample(index) for index in range(corpus.num_samples)]
    begun = [int(one.ids[start]) for one in samples for start in one.starts]
    assert len(begun) > 5
    assert set(begun) == {start_id(tokenizer)} == {tokenizer.token_to_id(puts[0] if puts else END_OF_TEXT)}


@pytest.mark.parametrize(("size", "dtype"), [(32768, np.int16), (65537, np.int32)])
def test_the_largest_id_of_a_vocabulary_fits_its_token_type(tmp_path, size, dtype):
    words = Tokenizer(models.WordLevel({END_OF_TEXT: 0, **{f"w{number}": number for number in range(1, size)}}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    dataset = made([f"w1 w{size - 1}"], words, tmp_path / "out")
    assert dataset[0].tolist() == [1, size - 1, 0]
    assert dataset.dtype == dtype
