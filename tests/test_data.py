"""Tokens to batches: corpora of any origin, and an order that is a pure function of (seed, position)."""

import itertools
import math
import struct
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDatasetBuilder
from refusals import has, refusal

from megamoe import data
from megamoe.data import (
    MIX_BLOCK,
    SampleOrder,
    TokenCorpus,
    TrainData,
    corpus_counts,
    corpus_prefix,
    eval_batch,
    permute,
)

HEADER = 9 + 8 + 1 + 8 + 8


def build(prefix, tokens, dtype=np.int32, item=7):
    """Write `tokens` with DeepSpeed's builder, in items of `item` tokens, a document each."""
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for start in range(0, len(tokens), item):
        builder.add_item_numpy(np.asarray(tokens[start : start + item]))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def random_tokens(count, vocab_size, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, count)


# --- reading ---


@pytest.mark.parametrize("count", [11, 13, 20, 21, 22, 99])
def test_each_token_but_the_first_is_a_label_once(tmp_path, count):
    tokens = random_tokens(count, 50)
    corpus = TokenCorpus(build(tmp_path / "c", tokens), 10, 50)
    samples = [corpus.sample(index) for index in range(corpus.num_samples)]
    assert corpus.num_tokens == count
    assert corpus.num_samples == (count - 1) // 10
    assert all(sample.shape == (11,) and sample.dtype == np.int64 for sample in samples)
    assert np.concatenate([sample[1:] for sample in samples]).tolist() == tokens[1 : 1 + 10 * len(samples)].tolist()
    for before, after in itertools.pairwise(samples):
        assert before[-1] == after[0]
    assert samples[0][0] == tokens[0]


@pytest.mark.parametrize(
    "dtype",
    [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64],
    ids=lambda t: t.__name__,
)
def test_corpora_of_deepspeeds_builder_load_as_they_are(tmp_path, dtype):
    vocab_size = min(np.iinfo(dtype).max + 1, 100_000)
    tokens = [*random_tokens(60, vocab_size), vocab_size - 1]
    corpus = TokenCorpus(build(tmp_path / "c", tokens, dtype), 20, vocab_size)
    assert [token for index in range(3) for token in corpus.sample(index)[1:]] == tokens[1:]


def megatron_corpus(prefix, documents, code, dtype):
    """The .bin/.idx as Megatron-LM lays them out, written by hand."""
    sizes = [len(document) for document in documents]
    width = np.dtype(dtype).itemsize
    starts = [sum(sizes[:number]) * width for number in range(len(sizes))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *starts)
    index += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    return prefix


@pytest.mark.parametrize("documents", [1, 4])
def test_a_uint16_corpus_of_megatron_loads_as_it_is(tmp_path, documents):
    tokens = np.append(random_tokens(40 * documents, 65536), 65535)
    prefix = megatron_corpus(tmp_path / "c", np.array_split(tokens, documents), 8, np.uint16)
    corpus = TokenCorpus(prefix, 40, 65536)
    assert corpus.num_samples == documents
    assert np.concatenate([corpus.sample(index)[1:] for index in range(documents)]).tolist() == tokens[1:].tolist()


def test_a_uint64_corpus_of_the_same_code_loads_too(tmp_path):
    tokens = random_tokens(41, 65536)
    corpus = TokenCorpus(megatron_corpus(tmp_path / "c", np.array_split(tokens, 3), 8, np.uint64), 40, 65536)
    assert corpus.sample(0).tolist() == tokens.tolist()


def test_exactly_one_sample_is_enough_and_one_token_less_is_refused(tmp_path):
    tokens = random_tokens(11, 50)
    corpus = TokenCorpus(build(tmp_path / "c", tokens), 10, 50)
    assert (corpus.num_samples, corpus.sample(0).tolist()) == (1, tokens.tolist())
    problem = refusal(TokenCorpus, build(tmp_path / "d", tokens[:10]), 10, 50)
    has(problem, str(tmp_path / "d"), "10 tokens", "10 + 1", "add text", "--seq_len")


def test_missing_files_are_named(tmp_path):
    prefix = build(tmp_path / "c", range(20))
    problem = refusal(TokenCorpus, tmp_path / "no", 10, 50)
    has(problem, f"{tmp_path}/no.bin", f"{tmp_path}/no.idx", "does not exist", "tools/prepare_data.py")
    (tmp_path / "c.idx").rename(tmp_path / "kept.idx")
    problem = refusal(TokenCorpus, prefix, 10, 50)
    has(problem, f"{prefix}.idx", "does not exist")
    assert f"{prefix}.bin" not in problem


def test_a_truncated_index_is_refused_with_both_sizes(tmp_path):
    prefix = build(tmp_path / "c", range(20))  # 3 items, 4 document starts
    whole = (tmp_path / "c.idx").read_bytes()
    assert len(whole) == HEADER + 3 * 12 + 4 * 8
    for size in range(len(whole)):
        (tmp_path / "c.idx").write_bytes(whole[:size])
        problem = refusal(TokenCorpus, prefix, 10, 50)
        has(problem, f"{prefix}.idx", "prepare the corpus again")
        if size >= HEADER:
            has(problem, f"{size} bytes", str(len(whole)), "3 items")
    (tmp_path / "c.idx").write_bytes(whole + b"x")
    has(refusal(TokenCorpus, prefix, 10, 50), f"{len(whole) + 1} bytes", str(len(whole)))


@pytest.mark.parametrize("change", [-1, -4, -40, 1, 4])
def test_a_bin_that_is_too_short_or_too_long_is_refused_with_both_sizes(tmp_path, change):
    prefix = build(tmp_path / "c", range(20))
    whole = (tmp_path / "c.bin").read_bytes()
    (tmp_path / "c.bin").write_bytes(whole[:change] if change < 0 else whole + bytes(change))
    problem = refusal(TokenCorpus, prefix, 10, 50)
    has(problem, f"{prefix}.idx", "80 bytes", f"{prefix}.bin", str(80 + change), "prepare it again")


def test_an_index_of_another_bin_is_refused(tmp_path):
    prefix = build(tmp_path / "c", range(20))
    build(tmp_path / "d", range(30))
    (tmp_path / "d.idx").rename(tmp_path / "c.idx")
    has(refusal(TokenCorpus, prefix, 10, 50), "describes 120 bytes", "has 80", "not of one corpus")


def test_a_file_that_is_no_index_is_refused(tmp_path):
    prefix = build(tmp_path / "c", range(20))
    whole = (tmp_path / "c.idx").read_bytes()
    for content in (b"", b"TNTIDX\x00\x00" + whole, b"\x00" + whole[1:], b"hello " * 30):
        (tmp_path / "c.idx").write_bytes(content)
        has(refusal(TokenCorpus, prefix, 10, 50), f"{prefix}.idx", "not a Megatron index", "prepare")


@pytest.mark.parametrize("code", [0, 9, 255])
def test_an_index_of_no_whole_numbers_is_refused(tmp_path, code):
    prefix = build(tmp_path / "c", range(20))
    whole = bytearray((tmp_path / "c.idx").read_bytes())
    whole[17] = code
    (tmp_path / "c.idx").write_bytes(whole)
    has(refusal(TokenCorpus, prefix, 10, 50), f"{prefix}.idx", f"code {code}", "prepare")


def test_an_empty_corpus_is_refused(tmp_path):
    has(refusal(TokenCorpus, build(tmp_path / "c", []), 10, 50), str(tmp_path / "c"), "empty", "give one")
    prefix = build(tmp_path / "d", range(20))
    (tmp_path / "d.bin").write_bytes(b"")
    has(refusal(TokenCorpus, prefix, 10, 50), str(prefix), "empty", "give one")


@pytest.mark.parametrize("bad", [50, 51, 30000, -1, -7])
def test_an_id_beyond_the_vocabulary_is_refused_before_the_run(tmp_path, bad):
    tokens = random_tokens(41, 50)
    tokens[17] = bad
    problem = refusal(TokenCorpus, build(tmp_path / "c", tokens, np.int16), 10, 50)
    has(problem, str(tmp_path / "c"), f"id {bad},", "vocabulary of 50", "tokenizer", "vocab_size")


def test_the_largest_id_of_the_vocabulary_is_accepted(tmp_path):
    assert TokenCorpus(build(tmp_path / "c", [0, 49] * 6), 10, 50).sample(0).max() == 49


def test_the_start_is_checked_before_the_run_and_every_sample_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SCAN", 20)
    for place, at_start in ((19, True), (20, False), (35, False)):
        tokens = random_tokens(51, 50)
        tokens[place] = 77
        prefix = build(tmp_path / f"c{place}", tokens)
        if at_start:
            has(refusal(TokenCorpus, prefix, 10, 50), "id 77")
            continue
        corpus = TokenCorpus(prefix, 10, 50)
        assert corpus.sample(0).tolist() == tokens[:11].tolist()
        for index in range(5):
            if 10 * index <= place <= 10 * index + 10:
                has(refusal(corpus.sample, index), "id 77", "vocabulary of 50")


def test_a_folder_holds_its_splits_and_anything_else_is_a_prefix(tmp_path):
    assert corpus_prefix(str(tmp_path), "valid") == tmp_path / "valid"
    assert corpus_prefix(str(tmp_path / "mine"), "train") == tmp_path / "mine"
    assert corpus_counts(str(tmp_path)) is None
    (tmp_path / "corpus.json").write_text('{"train": {"tokens": 3}}')
    assert corpus_counts(str(tmp_path)) == {"train": {"tokens": 3}}


# --- the permutation ---


def permutation(size, *key):
    return [permute(index, size, *key) for index in range(size)]


def test_the_hash_begins_as_splitmix64():
    assert data._mix(1234567) == 6457827717110365317  # first output of the reference code for this seed


@pytest.mark.parametrize("size", [*range(1, 71), 127, 128, 129, 1000, 4096, 4097, 10007])
def test_permute_is_a_bijection(size):
    for key in ((0,), (3, 5)):
        assert sorted(permutation(size, *key)) == list(range(size))


def test_permute_differs_by_every_part_of_its_key():
    keys = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (1, 2), (0, 1, 2, 3)]
    assert len({tuple(permutation(100, *key)) for key in keys}) == len(keys)


def chi_square(counts, cells):
    expected = sum(counts.values()) / cells
    return sum((counts[cell] - expected) ** 2 for cell in counts) / expected + (cells - len(counts)) * expected


def assert_uniform(counts, cells):
    """Chi-square with cells - 1 degrees of freedom, normal approximation, five standard deviations."""
    excess = (chi_square(counts, cells) - cells) / math.sqrt(2 * cells)
    assert abs(excess) < 5, excess


@pytest.mark.parametrize("size", [2, 3, 7, 10, 16, 17])
def test_every_index_goes_everywhere_equally_often_over_the_keys(size):
    counts = Counter((index, permute(index, size, 11, key)) for key in range(1500) for index in range(size))
    assert_uniform(counts, size * size)


def test_neighbours_are_sent_to_unrelated_places():
    places = permutation(20_000, 5)
    for stride in (1, 2, 64):
        pairs = Counter((a * 10 // 20_000, b * 10 // 20_000) for a, b in zip(places, places[stride:], strict=False))
        assert_uniform(pairs, 100)


def test_a_permutation_has_as_many_fixed_points_and_rises_as_chance_gives():
    fixed = sum(permute(index, 100, key) == index for key in range(300) for index in range(100))
    assert abs(fixed - 300) < 5 * math.sqrt(300)
    places = permutation(10_000, 9)
    rises = sum(a < b for a, b in itertools.pairwise(places))
    assert abs(rises - 5000) < 5 * math.sqrt(10_000 / 12)


# --- the order of samples ---


def walk(order, start, count):
    return [order.at(position) for position in range(start, start + count)]


def test_each_epoch_visits_each_sample_once_in_another_order():
    order = SampleOrder.of([97], [1.0], seed=3)
    epochs = [tuple(sample for _, sample in walk(order, 97 * epoch, 97)) for epoch in range(50)]
    assert all(sorted(epoch) == list(range(97)) for epoch in epochs)
    assert len(set(epochs)) == 50


@pytest.mark.parametrize("weights", [[1.0], [5.0, 1.0, 2.0]])
def test_each_corpus_is_walked_through_before_it_begins_again(weights):
    sizes = [97, 40, 701][: len(weights)]
    visits = [[] for _ in sizes]
    for corpus, sample in walk(SampleOrder.of(sizes, weights, seed=4), 0, 2 * MIX_BLOCK):
        visits[corpus].append(sample)
    for samples, size in zip(visits, sizes, strict=True):
        epochs = [samples[start : start + size] for start in range(0, len(samples) - size + 1, size)]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)


def test_at_the_end_of_a_block_no_sample_is_more_than_one_visit_ahead():
    sizes = [1500, 40, 701]
    order = SampleOrder.of(sizes, [5.0, 1.0, 2.0], seed=4)
    seen = [Counter() for _ in sizes]
    for block in range(3):
        for corpus, sample in walk(order, block * MIX_BLOCK, MIX_BLOCK):
            seen[corpus][sample] += 1
        for counts, size in zip(seen, sizes, strict=True):
            epochs, rest = divmod(counts.total(), size)
            assert sorted(counts[sample] for sample in range(size)) == [epochs] * (size - rest) + [epochs + 1] * rest


def test_the_order_is_a_pure_function_of_seed_and_position():
    positions = np.random.default_rng(5).integers(0, 10**6, 40).tolist()
    asked_at_random = {position: SampleOrder.of([500, 30], [3.0, 1.0], seed=6).at(position) for position in positions}
    order = SampleOrder.of([500, 30], [3.0, 1.0], seed=6)
    assert all(order.at(position) == asked_at_random[position] for position in sorted(positions))
    other = SampleOrder.of([500, 30], [3.0, 1.0], seed=7)
    assert sum(other.at(position) == asked_at_random[position] for position in positions) < 10


def test_corpora_of_one_size_are_walked_in_different_orders():
    visits = {0: [], 1: []}
    for corpus, sample in walk(SampleOrder.of([97, 97], [1.0, 1.0], seed=13), 0, MIX_BLOCK):
        visits[corpus].append(sample)
    assert visits[0] != visits[1]


def test_another_seed_gives_another_order_of_a_single_corpus_and_of_a_mix():
    for sizes in ([97], [97, 97]):
        orders = [SampleOrder.of(sizes, [1.0] * len(sizes), seed) for seed in range(10)]
        assert len({tuple(sample for _, sample in walk(order, 0, 97)) for order in orders}) == 10


def independent_shares(weights):
    """Largest remainder in exact arithmetic."""
    total = sum(Fraction(weight) for weight in weights)
    ideal = [Fraction(weight) / total * MIX_BLOCK for weight in weights]
    shares = [math.floor(share) for share in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda i: ideal[i] - shares[i], reverse=True)
    for i in by_remainder[: MIX_BLOCK - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


def test_shares_are_those_of_the_largest_remainder():
    draw = np.random.default_rng(7)
    for _ in range(200):
        weights = draw.uniform(0.01, 1, draw.integers(1, 12)).tolist()
        shares = SampleOrder.of([10] * len(weights), weights, seed=0).shares
        assert sum(shares) == MIX_BLOCK
        assert shares == independent_shares(weights)
    assert SampleOrder.of([1, 1], [3.0, 1.0], 0).shares == (3072, 1024)
    assert SampleOrder.of([1] * 3, [1.0] * 3, 0).shares == (1366, 1365, 1365)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.2, 0.1], [10.0, 1.0, 1.0, 0.01], [1.0]])
def test_every_block_holds_each_corpus_in_its_exact_share(weights):
    order = SampleOrder.of([900 + i for i in range(len(weights))], weights, seed=8)
    places = [tuple(corpus for corpus, _ in walk(order, block * MIX_BLOCK, MIX_BLOCK)) for block in (0, 1, 10**9)]
    for block in places:
        counts = Counter(block)
        assert tuple(counts[corpus] for corpus in range(len(weights))) == independent_shares(weights)
    assert len(set(places)) == (3 if len(weights) > 1 else 1)


def test_over_a_long_run_the_weights_are_kept():
    weights = [0.7, 0.2, 0.1]
    order = SampleOrder.of([1000, 2000, 50], weights, seed=9)
    counts = Counter(corpus for corpus, _ in walk(order, 12_345, 50_000))
    for corpus, weight in enumerate(weights):
        assert abs(counts[corpus] / 50_000 - weight) < 1 / MIX_BLOCK + MIX_BLOCK / 50_000 * 0.02


def test_corpora_are_shuffled_within_a_block():
    order = SampleOrder.of([10**6, 10**6], [1.0, 3.0], seed=10)
    corpora = [corpus for corpus, _ in walk(order, 0, MIX_BLOCK)]
    changes = sum(a != b for a, b in itertools.pairwise(corpora))
    assert abs(changes - MIX_BLOCK * 2 * 0.25 * 0.75) < 5 * math.sqrt(MIX_BLOCK * 0.375 * 0.625)
    for quarter in range(4):
        share = corpora[quarter * 1024 : quarter * 1024 + 1024].count(0)
        assert abs(share - 256) < 5 * math.sqrt(1024 * 0.25 * 0.75)


def test_a_weight_too_small_for_one_position_is_refused():
    has(refusal(SampleOrder.of, [5, 5], [1.0, 1e-5], 0), "weight 1e-05", "1/4096", "raise it or leave it out")
    assert SampleOrder.of([5, 5], [1.0, 1 / 4095], 0).shares == (4095, 1)


def test_a_position_far_away_in_a_huge_corpus_needs_neither_memory_nor_a_search(monkeypatch):
    hashes = []
    plain = data._mix
    monkeypatch.setattr(data, "_mix", lambda *values: hashes.append(1) or plain(*values))
    order = SampleOrder.of([10**9, 10**9 + 7], [1.0, 2.0], seed=11)
    tracemalloc.start()
    found = [order.at(10**12 + step) for step in range(20)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000  # a block of positions may be kept, an index of samples not
    assert len(hashes) < 50 * MIX_BLOCK
    assert len(set(found)) == 20
    assert all(0 <= sample < order.sizes[corpus] for corpus, sample in found)


# --- batches ---


def train_data(folder, seed=12):
    corpora = [
        TokenCorpus(build(folder / f"c{number}", random_tokens(count, 50, number)), 10, 50)
        for number, count in enumerate((500, 211))
    ]
    return TrainData(corpora, [2.0, 1.0], seed)


def test_a_batch_is_inputs_and_the_same_moved_by_one(tmp_path):
    source = train_data(tmp_path)
    inputs, labels = source.batch(5, 4)
    assert inputs.shape == labels.shape == (4, 10)
    assert inputs.dtype == labels.dtype == torch.int64
    for row, position in enumerate(range(5, 9)):
        corpus, sample = source.order.at(position)
        tokens = source.corpora[corpus].sample(sample).tolist()
        assert inputs[row].tolist() == tokens[:-1]
        assert labels[row].tolist() == tokens[1:]


def samples_of_step(source, step, micro_batch, accumulation, world_size):
    """The samples that all ranks together train on in one step, dealt out as the training loop deals them."""
    rows = []
    for rank, micro in itertools.product(range(world_size), range(accumulation)):
        group = ((step - 1) * accumulation + micro) * world_size + rank
        inputs, labels = source.batch(group * micro_batch, micro_batch)
        rows += torch.cat((inputs, labels), dim=1).tolist()
    return sorted(rows)


def test_the_ranks_together_train_on_the_same_samples_however_many_there_are(tmp_path):
    source = train_data(tmp_path)
    for step in (1, 2, 9):
        alone = samples_of_step(source, step, micro_batch=8, accumulation=1, world_size=1)
        for micro_batch, accumulation, world_size in ((4, 1, 2), (2, 1, 4), (2, 4, 1), (2, 2, 2), (1, 2, 4)):
            assert samples_of_step(source, step, micro_batch, accumulation, world_size) == alone
    first, second = (samples_of_step(source, step, 8, 1, 1) for step in (1, 2))
    assert first != second


@pytest.mark.parametrize("limit", [1, 7, 8, 16, 19])
@pytest.mark.parametrize(("micro_batch", "world_size"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 4)])
def test_an_evaluation_counts_every_sample_up_to_its_limit_once(tmp_path, limit, micro_batch, world_size):
    corpus = TokenCorpus(build(tmp_path / "c", random_tokens(191, 50)), 10, 50)
    assert corpus.num_samples == 19
    counted = []
    for start in range(0, limit, micro_batch * world_size):
        for rank in range(world_size):
            inputs, labels = eval_batch(corpus, start + rank * micro_batch, micro_batch, limit)
            assert inputs.shape == labels.shape == (micro_batch, 10)
            assert inputs.min() >= 0  # only labels are masked
            for row_in, row_out in zip(inputs.tolist(), labels.tolist(), strict=True):
                if set(row_out) != {-100}:
                    counted.append([*row_in, row_out[-1]])
                    assert row_out[:-1] == row_in[1:]
    assert counted == [corpus.sample(index).tolist() for index in range(limit)]
