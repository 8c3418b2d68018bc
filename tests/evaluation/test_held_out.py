"""Held-out sets, and the bytes of their text: counted when it was prepared, or decoded from its tokens."""

import math
import shutil

import numpy as np
import pytest
import torch
from corpora import write_corpus
from exported import random_decoder
from model_parts import model_of

from megamoe.data.corpus_record import read_record
from megamoe.data.token_files import TokenCorpus, corpus_prefix
from megamoe.data.tokenizer import train_tokenizer
from megamoe.evaluation.held_out import Evaluator, HeldOut, tokens_per_byte
from megamoe.evaluation.scoring import Share

TEXTS = [f"The mouse reads map {number}; the owl sings — naïve 😀.\n" * 20 for number in range(30)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    tokenizer = train_tokenizer(TEXTS[:3], 300)
    write_corpus([("train", TEXTS[0]), *(("valid", text) for text in TEXTS)], tokenizer, folder)
    return folder


@pytest.fixture
def folder(corpus, tmp_path):
    return shutil.copytree(corpus, tmp_path / "corpus")


def held_out(path, seq_len=16):
    return TokenCorpus(corpus_prefix(str(path), "valid"), seq_len, 300)


def test_a_prepared_folder_or_a_prefix_in_it_has_its_own_counts(corpus):
    splits = read_record(corpus).splits
    for form in ("", "valid", "valid.bin", "valid.idx", "train"):
        own = splits["train" if form == "train" else "valid"]
        assert tokens_per_byte(held_out(corpus / form), 5) == own.tokens / own.bytes, form


@pytest.mark.parametrize("seq_len", [16, 301])
def test_the_bytes_of_another_corpus_are_those_of_its_decoded_text(folder, seq_len):
    own = read_record(folder).splits["valid"]
    found = tokens_per_byte(held_out(folder / "valid-00000", seq_len), 10**6)
    assert found == pytest.approx(own.tokens / own.bytes, rel=0.01)  # characters torn between samples


def test_without_counts_and_tokenizer_the_bytes_are_not_known(folder):
    (folder / "tokenizer.json").unlink()
    assert tokens_per_byte(held_out(folder / "valid-00000"), 5) is None


def test_a_set_has_the_mean_over_its_first_samples_without_dropout_and_bits_per_byte_where_bytes_are_known(corpus):
    model, tokens = random_decoder(model_of("latent_tokens", vocab_size=300, expert_dropout=0.3)), held_out(corpus)
    samples = [tokens.sample(index) for index in range(11)]
    ids, labels = (torch.from_numpy(np.stack([one[part] for one in samples])) for part in (0, 1))
    expected = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten()).item()
    evaluator = Evaluator([HeldOut("one", tokens, 0.25), HeldOut("two", tokens, None)], limit=11)
    assert evaluator.run(model.train(), Share(4), torch.device("cpu")) == {
        "loss": pytest.approx(expected),
        "tokens": 11 * 16,
        "bits_per_byte": pytest.approx(expected / math.log(2) / 4),
        "two_loss": pytest.approx(expected),
    }


def test_documents_of_a_set_are_scored_by_themselves_where_the_model_is_trained_so(corpus):
    config = model_of("sliding_multi_token", vocab_size=300, document_attention=True)
    model, tokens = random_decoder(config).double(), TokenCorpus(corpus_prefix(str(corpus), "valid"), 512, 300)
    samples = [tokens.sample(index) for index in range(5)]
    alone = [part for one in samples for part in np.split(np.stack(one[:2]), one.starts, axis=1)]
    assert len(alone) > len(samples)
    losses = [model.score(*torch.from_numpy(part).unsqueeze(1)).nats.sum() for part in alone]
    count = 5 * 512
    found = Evaluator([HeldOut("one", tokens, None)], limit=5).run(model, Share(2), torch.device("cpu"))
    assert found == {"loss": pytest.approx(sum(losses).item() / count, abs=1e-9), "tokens": count}
