"""Batches of a run."""

import itertools
from functools import partial

import numpy as np
import torch
from corpora import build, random_tokens, train_data

from megamoe.data import batches
from megamoe.data.batches import Batch
from megamoe.data.document_bounds import Documents
from megamoe.data.order import SampleOrder
from megamoe.data.source import Sample
from megamoe.data.token_files import TokenCorpus


def two_corpora(folder, seq_len=10):
    return [
        TokenCorpus(build(folder / f"c{number}_{seq_len}", random_tokens(count, 50, number)), seq_len, 50)
        for number, count in enumerate((500, 211))
    ]


def rows(data, step, ranks=1):
    """(inputs, labels) of the samples of a step, in the order of their positions."""
    taken = [list(data.step_batches(step, rank)) for rank in range(ranks)]
    micro = [batch for together in zip(*taken, strict=True) for batch in together]
    pairs = [pair for one in micro for pair in zip(one.input_ids, one.labels, strict=True)]
    return [(inputs.tolist(), labels.tolist()) for inputs, labels in pairs]


def test_a_batch_is_the_samples_of_its_step(tmp_path):
    sources = two_corpora(tmp_path)
    data = train_data(sources, [2.0, 1.0], samples=4)
    order = SampleOrder.of([source.num_samples for source in sources], [2.0, 1.0], seed=12)
    for step in (1, 2, 40):
        (batch,) = data.step_batches(step, 0)
        assert batch.input_ids.shape == batch.labels.shape == (4, 10)
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        places = [order.at(position) for position in range(4 * step - 4, 4 * step)]
        assert data.step_samples(step) == places
        samples = [sources[corpus].sample(index) for corpus, index in places]
        assert rows(data, step) == [(one.ids.tolist(), one.labels.tolist()) for one in samples]


def test_labels_further_ahead_go_on_in_the_document_and_end_with_it(tmp_path):
    tokens = random_tokens(34, 50).tolist()  # three samples, and three tokens that are in none
    data = train_data([TokenCorpus(build(tmp_path / "c", tokens, item=12), 10, 50)], [1.0], samples=3)
    ends = {0: 12, 10: 24, 20: 34}  # the last token that counts, by the sample's start: a document's first is one
    starts = [10 * index for _, index in data.step_samples(1)]
    for ahead in (0, 1, 3, 25):
        (batch,) = data.step_batches(1, 0, ahead)
        assert batch.input_ids.tolist() == [tokens[start : start + 10] for start in starts]
        for start, labels in zip(starts, batch.labels.tolist(), strict=True):
            known = tokens[start + 1 : min(start + 11 + ahead, ends[start] + 1)]
            assert labels == known + [-100] * (10 + ahead - len(known))


class Rows:
    """Two samples, whose documents begin anywhere, the second one padded."""

    seq_len, num_samples, fingerprint = 8, 2, "rows"
    starts = np.array([1, 8, 9]), np.array([3])

    def sample(self, index, ahead=0):
        ids = np.arange(6 if index else 8) + 10 * index
        return Sample(ids, np.arange(5 if index else 8 + ahead) + 10 * index + 1, self.starts[index])


def test_documents_and_padding_of_rows_are_known_on_the_host():
    (batch,) = train_data([Rows()], [1.0], 2, document_attention=True).step_batches(1, 0, ahead=1)
    order = torch.argsort(batch.input_ids[:, 0])  # of the rows
    documents = batch.documents
    assert batch.input_ids[order].tolist() == [list(range(8)), [10, 11, 12, 13, 14, 15, 0, 0]]
    assert batch.labels[order].tolist() == [list(range(1, 10)), [11, 12, 13, 14, 15, *[-100] * 4]]
    assert documents.positions[order].tolist() == [[0, *range(7)], [0, 1, 2, 0, 1, 2, 0, 1]]
    of_rows = [[0, 1], [0, 3, 6]]
    first, second = (of_rows[row] for row in order.tolist())
    assert documents.starts.tolist() == [*first, *(8 + start for start in second), 16]
    assert documents.starts.dtype == torch.int32
    assert documents.longest == 7
    assert documents.tokens.tolist() == [place for place in range(16) if batch.input_ids.flatten()[place] or not place]
    (together,) = train_data([Rows()], [1.0], 2).step_batches(1, 0, ahead=1)  # without attention to documents
    assert torch.equal(together.labels, batch.labels)
    assert sorted(together.documents.starts.diff().tolist()) == [2, 6, 8]  # padding alone is apart
    assert torch.equal(together.documents.tokens, documents.tokens)


# Of the other forms, a mix that changes, as its batch and its length do; the second phase goes on with the same mix.
PHASES = [
    {"tokens": 2 * 4 * 10, "samples_per_step": 4},
    {"tokens": 3 * 8 * 10 - 9},
    {"tokens": 5 * 8 * 10, "data": ["1=3", "0"]},
    {"data": ["1"], "samples_per_step": 16},
]


def test_the_ranks_together_train_on_the_same_samples_in_order_however_many_there_are(tmp_path):
    sources = two_corpora(tmp_path)
    alone = train_data(sources, [2.0, 1.0], samples=8, micro_batch=4, given=PHASES)
    expected = {step: rows(alone, step) for step in (1, 2, 3, 5, 6, 10, 11, 12)}
    assert [len(expected[step]) for step in expected] == [4, 4, 8, 8, 8, 8, 16, 16]
    for micro_batch, ranks in ((2, 1), (2, 2), (1, 4), (1, 2)):
        data = train_data(sources, [2.0, 1.0], 8, micro_batch=micro_batch, world_size=ranks, given=PHASES)
        for step, taken in expected.items():
            assert rows(data, step, ranks) == taken
            assert data.step_samples(step) == alone.step_samples(step)


def test_a_corpus_goes_on_where_the_phase_before_has_left_it_and_the_record_says_so(tmp_path):
    sources = two_corpora(tmp_path)
    data = train_data(sources, [2.0, 1.0], samples=8, micro_batch=4, given=PHASES)
    visits, epoch = {0: [], 1: []}, [source.num_samples for source in sources]
    for step in range(1, 40):
        for corpus, sample in data.step_samples(step):
            visits[corpus].append(sample)
    for corpus, walked in visits.items():
        for start in range(0, len(walked), epoch[corpus]):
            of_epoch = walked[start : start + epoch[corpus]]
            assert len(set(of_epoch)) == len(of_epoch)
    assert len(visits[0]) > 30
    assert len(visits[1]) > 2 * epoch[1]
    record = data.record()
    assert [phase["first_step"] for phase in record] == [1, 3, 6, 11]
    for phase, following in itertools.pairwise(record):
        for source in phase["data"]:
            steps = range(phase["first_step"], following["first_step"])
            found = sum(str(corpus) == source["path"] for step in steps for corpus, _ in data.step_samples(step))
            assert source["samples"] == found
    later = {source["path"]: source["first_sample"] for source in record[2]["data"]}
    assert later == {one["path"]: one["first_sample"] + one["samples"] for one in record[1]["data"]}


def test_with_longer_samples_a_corpus_counts_its_epochs_by_tokens(tmp_path):
    short, long = (two_corpora(tmp_path, seq_len)[0] for seq_len in (10, 20))
    given = [{"tokens": 300, "samples_per_step": 5}, {"seq_len": 20}]
    data = train_data([short, long], [1.0], samples=2, micro_batch=1, given=given)
    assert [len(row[0]) for step in (6, 7) for row in rows(data, step)] == [10] * 5 + [20] * 2
    assert data.record()[1]["data"][0]["first_sample"] == 300 // 20


def test_only_a_pinned_batch_is_copied_while_the_host_goes_on(monkeypatch):
    ids = torch.zeros(1, 2, dtype=torch.int64)
    batch = Batch(ids, ids + 1, Documents.of([np.array([1])], [2], 2))
    copies = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **options: copies.append(options) or tensor)
    for is_pinned in (True, False):
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor, is_pinned=is_pinned: is_pinned)
        batch.to(torch.device("cuda"))
    assert copies == [{"non_blocking": True}] * 4 + [{"non_blocking": False}] * 4


def test_samples_of_object_stores_are_read_ahead_by_threads_each_once(tmp_path, monkeypatch):
    sources, asked = two_corpora(tmp_path), []
    local = train_data(sources, [1.0, 1.0], samples=4, world_size=2, micro_batch=1)
    assert not local._threads
    steps = (1, 2, 3, 6, 7)  # the run has gone back after step 3
    expected = {step: rows(local, step, 2) for step in steps}
    monkeypatch.setattr(batches, "is_remote", lambda path: True)
    monkeypatch.setattr(batches, "READ_AHEAD", 5)  # of two per step: three steps

    def sample(number, read, index, ahead):
        asked.append((number, index))
        return read(index, ahead)

    for number, source in enumerate(sources):
        monkeypatch.setattr(source, "sample", partial(sample, number, source.sample))
    data = train_data(sources, [1.0, 1.0], samples=4, world_size=2, micro_batch=1)
    assert {step: rows(data, step, 2) for step in steps} == expected
    data._threads.shutdown()
    assert sorted(asked) == sorted(place for step in range(1, 11) for place in data.step_samples(step))
