"""Corpora beyond 2^32 tokens, in sparse files; seeds beyond 2^32."""

import numpy as np
import pytest
import torch
from model_parts import model_of

from megamoe.data.index_file import write_index
from megamoe.data.order import permute
from megamoe.data.packing import PackedCorpus
from megamoe.data.token_files import TokenCorpus
from megamoe.model.decoder import Decoder

LENGTHS = [2**31 - 1, 2**31 - 10, 30, 50]  # tokens of each document; the last two lie across 2^32 tokens
TOKENS, SEQ_LEN = sum(LENGTHS), 20


@pytest.fixture
def prefix(tmp_path):
    """All ids are 0 but the last 100, which are 1 to 100."""
    write_index(tmp_path / "large.idx", np.uint16, np.array(LENGTHS))
    with open(tmp_path / "large.bin", "wb") as file:
        file.seek(2 * (TOKENS - 100))
        np.arange(1, 101, dtype=np.uint16).tofile(file)
    return tmp_path / "large"


def test_samples_and_documents_beyond_2_to_the_32_tokens_are_found(prefix):
    corpus = TokenCorpus(prefix, SEQ_LEN, 101, scan=False)
    borders = np.cumsum(LENGTHS)[:-1]
    assert corpus.starts(1, TOKENS).tolist() == borders.tolist()
    sample = corpus.sample(corpus.num_samples - 2)
    first = ((TOKENS - 1) // SEQ_LEN - 2) * SEQ_LEN
    assert sample.ids.tolist() == list(range(first + 101 - TOKENS, first + 101 - TOKENS + SEQ_LEN))
    assert sample.starts.tolist() == [place for place in (borders - first).tolist() if 0 < place < SEQ_LEN]
    packed = PackedCorpus(TokenCorpus(prefix, 1 << 20, 101, scan=False), writes=False)
    pieces = packed._index[packed.num_samples + 1 :]
    assert {*range(22, 100)} <= {*packed.sample(0).ids.tolist(), *packed.sample(packed.num_samples - 1).ids.tolist()}
    assert (pieces // (packed.seq_len + 1)).max() == borders[-1]


def test_seeds_that_differ_beyond_32_bits_give_other_weights_and_orders():
    first, second = 7, 7 + 2**32
    weights = [Decoder(model_of("plain_scores"), seed).state_dict() for seed in (first, second)]
    drawn = [name for name in weights[0] if "proj" in name or "embed" in name]
    assert len(drawn) > 5
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in drawn)
    assert permute(5, 10**12, first) != permute(5, 10**12, second)
