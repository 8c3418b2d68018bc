"""Corpora beyond 2^32 tokens (in sparse files), orders of 10^12 samples, phases of 10^13 tokens, seeds beyond 2^32."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_parts import model_of

from megamoe.config.phases import PhaseSettings, make_phases
from megamoe.config.run import Corpus
from megamoe.data.index_file import write_index
from megamoe.data.order import SampleOrder, permute
from megamoe.data.packing import PackedCorpus, _make_index
from megamoe.data.token_files import TokenCorpus
from megamoe.model.decoder import Decoder
from megamoe.utils.errors import UserError

LENGTHS = [2**31 - 1, 2**31 - 10, 30, 50]  # tokens of each document; the last two lie across 2^32 tokens
TOKENS, SEQ_LEN = sum(LENGTHS), 20


@pytest.fixture
def prefix(tmp_path):
    """All ids are 0 but the last 100, which are 1 to 100."""
    write_index(tmp_path / "large.idx", np.uint16, np.array(LENGTHS))
    with open(tmp_path / "large.bin", "wb") as file:
        file.truncate(2 * TOKENS)
        file.seek(2 * (TOKENS - 100))
        np.arange(1, 101, dtype=np.uint16).tofile(file)
    return tmp_path / "large"


def test_samples_and_documents_beyond_2_to_the_32_tokens_are_found(prefix):
    corpus = TokenCorpus(prefix, SEQ_LEN, 101, scan=False)
    assert corpus.num_tokens == TOKENS > 2**32
    assert corpus.num_samples == (TOKENS - 1) // SEQ_LEN
    borders = np.cumsum(LENGTHS)[:-1].tolist()
    assert corpus.starts(1, TOKENS).tolist() == borders
    index = corpus.num_samples - 2
    first = index * SEQ_LEN
    sample = corpus.sample(index)
    assert sample.ids.tolist() == [place + 101 - TOKENS for place in range(first, first + SEQ_LEN)]
    assert sample.labels.tolist() == [one + 1 for one in sample.ids]
    assert sample.starts.tolist() == [border - first for border in borders if first < border < first + SEQ_LEN]


def test_packed_samples_beyond_2_to_the_32_tokens_are_whole_documents(prefix):
    corpus = TokenCorpus(prefix, 1 << 20, 101, scan=False)
    packed = PackedCorpus(corpus, writes=False)
    pieces = {length for sample in range(packed.num_samples) for length in _lengths(packed, sample)}
    assert {30, 49} < pieces  # the last token is only a label
    last = next(sample for sample in range(packed.num_samples) if 30 in _lengths(packed, sample))
    assert set(range(52, 101)) - {100} <= set(packed.sample(last).ids.tolist())


def _lengths(packed, sample):
    begin, end = packed._index[sample : sample + 2]
    return (packed._index[begin:end] % (packed.seq_len + 1)).tolist()


def test_a_packing_that_its_index_cannot_hold_is_refused():
    corpus = SimpleNamespace(num_tokens=10**13, seq_len=1 << 20, prefix="data/train")
    with pytest.raises(UserError, match="10000000000000 tokens, whose best-fit"):
        _make_index(corpus)


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_an_order_of_10_to_the_12_samples_repeats_none_and_reaches_all_parts(seed):
    size = 10**12
    found = [permute(index, size, seed) for index in (*range(2000), *range(size - 2000, size))]
    assert len(set(found)) == 4000
    assert min(found) >= 0
    assert {one * 16 // size for one in found} == set(range(16))
    order = SampleOrder.of([size, 3], [0.9, 0.1], seed)
    one = [order.at(position) for position in range(10**15, 10**15 + 100)]
    assert {source for source, _ in one} == {0, 1}
    assert max(sample for source, sample in one if source == 0) > 2**32


def test_seeds_that_differ_beyond_32_bits_give_other_weights_and_orders():
    seeds = [7, 7 + 2**32, 7 + 2**62]
    weights = [Decoder(model_of("plain_scores"), seed).state_dict() for seed in seeds]
    experts = [{name: one for name, one in of_seed.items() if "down_proj" in name} for of_seed in weights]
    for one, other in itertools.combinations(range(3), 2):
        assert not torch.equal(weights[one]["embed_tokens.weight"], weights[other]["embed_tokens.weight"])
        assert all(not torch.equal(experts[one][name], experts[other][name]) for name in experts[one])
        assert permute(5, 10**12, seeds[one]) != permute(5, 10**12, seeds[other])


def test_phases_of_10_to_the_13_tokens_begin_where_their_tokens_say():
    tokens, samples, seq_len = 10**13, 3, 4099  # no power of 2, so that a float would round
    given = [PhaseSettings(tokens=tokens), PhaseSettings()]
    one = dict(data=[Corpus(path="a")], seq_len=seq_len, micro_batch=1, samples=samples, world_size=1)
    phases = make_phases(given, **one)
    steps = -(-tokens // (samples * seq_len))
    assert phases.all[1].first_step == steps + 1
    assert phases.tokens_before(steps + 1) == steps * samples * seq_len
    assert phases.step_after(phases.tokens_before(steps + 1)) == steps
    assert phases.step_after(phases.tokens_before(steps + 1) + 1) == steps + 1
