"""Reading .bin/.idx files, whoever wrote them."""

import itertools
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from corpora import HEADER, build, prepared, random_tokens
from refusals import has, refusal

from megamoe.data import token_files
from megamoe.data.token_files import Shard, TokenCorpus, corpus_prefix


@pytest.mark.parametrize("count", [20, 21, 99])
def test_each_token_but_the_first_is_a_label_once(tmp_path, count):
    tokens = random_tokens(count, 50)
    corpus = TokenCorpus(build(tmp_path / "c", tokens), 10, 50)
    samples = [corpus.sample(index) for index in range(corpus.num_samples)]
    assert corpus.num_tokens == count
    assert corpus.num_samples == (count - 1) // 10
    assert all(part.shape == (10,) and part.dtype == np.int64 for sample in samples for part in sample[:2])
    ids, labels, _ = map(np.concatenate, zip(*samples, strict=True))
    assert ids.tolist() == tokens[: 10 * len(samples)].tolist()
    assert labels.tolist() == tokens[1 : 1 + 10 * len(samples)].tolist()


def test_corpora_of_deepspeeds_builder_load_as_they_are(tmp_path):
    for dtype in (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        vocab_size = min(np.iinfo(dtype).max + 1, 100_000)
        tokens = [*random_tokens(60, vocab_size), vocab_size - 1]
        corpus = TokenCorpus(build(tmp_path / dtype.__name__, tokens, dtype), 20, vocab_size)
        assert [token for index in range(3) for token in corpus.sample(index).labels] == tokens[1:], dtype


def test_exactly_one_sample_is_enough_and_one_token_less_is_refused(tmp_path):
    tokens = random_tokens(11, 50)
    corpus = TokenCorpus(build(tmp_path / "c", tokens), 10, 50)
    assert (corpus.num_samples, corpus.sample(0).labels.tolist()) == (1, tokens[1:].tolist())
    problem = refusal(TokenCorpus, build(tmp_path / "d", tokens[:10]), 10, 50)
    has(problem, str(tmp_path / "d"), "10 tokens", "10 + 1", "add text", "--seq_len")


def test_missing_files_are_named(tmp_path):
    prefix = build(tmp_path / "c", range(20))
    problem = refusal(TokenCorpus, tmp_path / "no", 10, 50)
    has(problem, f"{tmp_path}/no.bin", f"{tmp_path}/no.idx", "there is no", "megamoe prepare")
    (tmp_path / "c.idx").rename(tmp_path / "kept.idx")
    problem = refusal(TokenCorpus, prefix, 10, 50)
    has(problem, f"{prefix}.idx", "there is no")
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


def test_a_bin_that_is_too_short_or_too_long_is_refused_with_both_sizes(tmp_path):
    prefix = build(tmp_path / "c", range(20))
    whole = (tmp_path / "c.bin").read_bytes()
    for size in (79, 76, 40, 81, 84):
        (tmp_path / "c.bin").write_bytes((whole + bytes(4))[:size])
        problem = refusal(TokenCorpus, prefix, 10, 50)
        has(problem, f"{prefix}.idx", "80 bytes", f"{prefix}.bin", str(size), "prepare it again")


def test_a_file_that_is_no_index_or_one_of_another_form_is_refused(tmp_path):
    prefix = build(tmp_path / "c", range(20))
    whole = (tmp_path / "c.idx").read_bytes()
    versions = [whole[:9] + struct.pack("<Q", version) + whole[17:] for version in (0, 2, 1 << 56)]
    no_index = [b"", b"TNTIDX\x00\x00" + whole, b"\x00" + whole[1:], *versions]
    no_whole_numbers = {code: whole[:17] + bytes([code]) + whole[18:] for code in (0, 9, 255)}
    for content, said in (
        *((content, "not a Megatron index") for content in no_index),
        *((content, f"code {code}") for code, content in no_whole_numbers.items()),
    ):
        (tmp_path / "c.idx").write_bytes(content)
        has(refusal(TokenCorpus, prefix, 10, 50), f"{prefix}.idx", said, "prepare")


def test_an_empty_corpus_is_refused(tmp_path):
    has(refusal(TokenCorpus, build(tmp_path / "c", []), 10, 50), str(tmp_path / "c"), "empty", "give one")


def test_an_id_beyond_the_vocabulary_is_refused_before_the_run(tmp_path):
    tokens = random_tokens(41, 50)
    for bad in (50, 30000, -1, -7):
        tokens[17] = bad
        problem = refusal(TokenCorpus, build(tmp_path / f"{bad}", tokens, np.int16), 10, 50)
        has(problem, str(tmp_path / f"{bad}"), f"id {bad},", "vocabulary of 50", "tokenizer", "vocab_size")
    assert TokenCorpus(build(tmp_path / "largest", [0, 49] * 6), 10, 50).sample(0).ids.max() == 49


def test_the_start_is_checked_before_the_run_and_every_sample_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "SCAN", 20)
    for place, at_start in ((19, True), (20, False), (35, False)):
        tokens = random_tokens(51, 50)
        tokens[place] = 77
        prefix = build(tmp_path / f"c{place}", tokens)
        if at_start:
            has(refusal(TokenCorpus, prefix, 10, 50), "id 77")
            continue
        corpus = TokenCorpus(prefix, 10, 50)
        assert corpus.sample(0).ids.tolist() == tokens[:10].tolist()
        for index in range(5):
            if 10 * index <= place <= 10 * index + 10:
                has(refusal(corpus.sample, index), "id 77", "vocabulary of 50")


def test_the_scan_leaves_no_token_between_its_pieces_out(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "SCAN_PIECE", 7)
    tokens = random_tokens(20, 50)
    TokenCorpus(build(tmp_path / "c", tokens), 10, 50)
    for place in (0, 6, 7, 8, 13, 14, 19):
        changed = tokens.copy()
        changed[place] = 77
        has(refusal(TokenCorpus, build(tmp_path / f"{place}", changed), 10, 50), "id 77")


def test_items_that_are_no_whole_tokens_are_refused(tmp_path):
    prefix = build(tmp_path / "c", range(20), np.int32, item=20)  # one item: its size, then its place
    whole = bytearray((tmp_path / "c.idx").read_bytes())
    for size, start in ((19, 2), (20, 2), (-1, 84)):
        whole[HEADER : HEADER + 12] = struct.pack("<iq", size, start)
        (tmp_path / "c.idx").write_bytes(whole)
        (tmp_path / "c.bin").write_bytes(bytes(start + 4 * size))
        has(refusal(TokenCorpus, prefix, 10, 50), f"{prefix}.idx", f"{prefix}.bin", "prepare it again")


def test_a_corpus_that_is_a_pipe_is_refused_unopened(tmp_path):
    prefix = build(tmp_path / "c", range(20))
    for suffix in ("bin", "idx"):
        file = tmp_path / f"c.{suffix}"
        file.rename(tmp_path / "kept")
        os.mkfifo(file)
        has(refusal(TokenCorpus, prefix, 10, 50), str(file), "not a regular file")
        (tmp_path / "kept").replace(file)


def test_a_folder_holds_its_splits_and_anything_else_is_a_prefix_with_or_without_an_ending(tmp_path):
    assert corpus_prefix(str(tmp_path), "valid") == tmp_path / "valid"
    build(tmp_path / "mine.v2", range(20))
    for suffix in ("", ".bin", ".idx"):
        assert corpus_prefix(f"{tmp_path / 'mine.v2'}{suffix}", "train") == tmp_path / "mine.v2"
    assert TokenCorpus(tmp_path / "mine.v2", 10, 50).num_tokens == 20


@pytest.mark.parametrize("vocab_size", [300, 65536, 100_000])
@pytest.mark.parametrize("opens", [False, True])
def test_samples_run_over_the_ends_of_shards_and_say_where_documents_begin(tmp_path, vocab_size, opens):
    draw = np.random.default_rng(3)
    documents = [draw.integers(0, vocab_size, draw.integers(1, 40)).tolist() for _ in range(50)]
    tokens = [token for document in documents for token in document]
    begins = np.cumsum([0, *map(len, documents)]) - opens  # at the first token, or at the end of the document before
    for name, cuts in (("one", []), ("many", [1, 7, 8, 30])):
        bounds = [0, *cuts, 50]
        shards = [documents[start:stop] for start, stop in itertools.pairwise(bounds)]
        corpus = TokenCorpus(prepared(tmp_path / name, {"train": shards}, vocab_size, opens), 16, vocab_size)
        assert corpus.num_samples == (len(tokens) - 1) // 16
        for index in range(corpus.num_samples):
            ids, labels, starts = corpus.sample(index, ahead=2)
            start, stop = 16 * index, 16 * index + 16
            assert ids.tolist() == tokens[start:stop]
            further = next((begin - stop for begin in begins if stop <= begin < stop + 2), 2)  # with its own document
            assert labels.tolist() == tokens[start + 1 : stop + 1 + further]
            assert starts.tolist() == [begin - start for begin in begins if start < begin < stop]
        assert [one.tolist() for one in corpus.documents()] == documents


def test_a_corpus_of_any_number_of_shards_keeps_few_of_them_open(tmp_path):
    prefix = prepared(tmp_path / "c", {"train": [[[number] * 8] for number in range(3 * token_files.OPEN)]})
    before = len(os.listdir("/proc/self/fd"))
    corpus = TokenCorpus(prefix, 8, 300)
    read = np.concatenate([corpus.sample(index).ids for index in range(corpus.num_samples)])
    assert read.tolist() == np.repeat(np.arange(3 * token_files.OPEN - 1), 8).tolist()
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * token_files.OPEN


def test_two_bytes_hold_a_vocabulary_of_65536_by_megatrons_code(tmp_path):
    prepared(tmp_path / "c", {"train": [[[65535, 0, 3]], [[7]]]}, 65536)
    shard = tmp_path / "c" / "train-00000"
    assert np.fromfile(shard.with_suffix(".bin"), np.uint16).tolist() == [65535, 0, 3]
    assert shard.with_suffix(".idx").read_bytes()[17] == 8  # what else it holds, DeepSpeed reads of other types


def test_the_record_is_checked_in_place_of_the_tokens(tmp_path, monkeypatch):
    prefix = prepared(tmp_path / "c", {"train": [[[1, 2, 3] * 5], [[9, 49] * 9]]})
    has(refusal(TokenCorpus, prefix, 10, 49), "id 49", "vocabulary of 49")
    monkeypatch.setattr(Shard, "tokens", None)
    corpus = TokenCorpus(prefix, 10, 50)
    assert corpus.record.bytes == 3 * corpus.num_tokens == 99
    Path(f"{prefix}-00001.bin").write_bytes(b"")
    for scan in (True, False):
        if scan:
            has(refusal(TokenCorpus, prefix, 10, 50), "train-00001", "empty")
        else:
            assert TokenCorpus(prefix, 10, 50, scan).num_tokens == 33
    has(refusal(TokenCorpus, prefix.with_name("valid"), 10, 50), "no held-out split", "--valid_fraction")


def test_a_fingerprint_follows_tokens_and_borders_and_not_the_place(tmp_path):
    def of(name, documents):
        return TokenCorpus(prepared(tmp_path / name, {"train": [documents]}), 4, 50).fingerprint

    def of_pair(name, tokens, item):
        return TokenCorpus(build(tmp_path / name, tokens, item=item), 4, 50).fingerprint

    kept = of("a", [[1, 2, 3], [4, 5]])
    assert kept == of("b", [[1, 2, 3], [4, 5]])
    assert len({kept, of("c", [[1, 2], [3, 4, 5]]), of("d", [[1, 2, 3], [4, 6]])}) == 3
    assert of_pair("e", range(20), 5) == of_pair("f", range(20), 5)
    assert len({of_pair("g", range(20), 5), of_pair("h", range(20), 4), of_pair("i", range(1, 21), 5)}) == 3
