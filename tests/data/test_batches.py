"""Batches of a run."""

import torch
from corpora import build, random_tokens

from megamoe.data.batches import Batch, BatchShape, TrainData
from megamoe.data.token_files import TokenCorpus


def train_data(folder, seed=12):
    corpora = [
        TokenCorpus(build(folder / f"c{number}", random_tokens(count, 50, number)), 10, 50)
        for number, count in enumerate((500, 211))
    ]
    return TrainData(corpora, [2.0, 1.0], seed)


def test_a_batch_is_inputs_and_the_same_moved_by_one(tmp_path):
    source = train_data(tmp_path)
    batch = source.batch(5, 4)
    inputs, labels = batch.input_ids, batch.labels
    assert inputs.shape == labels.shape == (4, 10)
    assert inputs.dtype == labels.dtype == torch.int64
    for row, position in enumerate(range(5, 9)):
        corpus, sample = source.order.at(position)
        tokens = source.sources[corpus].sample(sample).ids.tolist()
        assert inputs[row].tolist() == tokens[:-1]
        assert labels[row].tolist() == tokens[1:]


def test_labels_further_ahead_go_on_in_the_corpus_and_end_with_it(tmp_path):
    tokens = random_tokens(34, 50).tolist()  # three samples, and three tokens that are in none
    corpus = TokenCorpus(build(tmp_path / "c", tokens), 10, 50)
    data = TrainData([corpus], [1.0], seed=1)
    followed = [*tokens, *[-100] * 30]
    for ahead in (0, 1, 3, 25):
        batch = data.batch(0, 3, ahead)
        starts = [10 * data.order.at(row)[1] for row in range(3)]
        assert batch.input_ids.tolist() == [tokens[start : start + 10] for start in starts]
        assert batch.labels.tolist() == [followed[start + 1 : start + 11 + ahead] for start in starts]
        (step,) = data.step_batches(1, 0, BatchShape(3, 1, 1, 10), ahead)
        assert torch.equal(step.labels, batch.labels)


def samples_of_step(source, step, micro_batch, accumulation, world_size):
    """The samples that all ranks together train on in one step."""
    rows, shape = [], BatchShape(micro_batch, accumulation, world_size, 10)
    for rank in range(world_size):
        batches = list(source.step_batches(step, rank, shape))
        assert [len(batch.input_ids) for batch in batches] == [micro_batch] * accumulation
        rows += [row for batch in batches for row in torch.cat((batch.input_ids, batch.labels), dim=1).tolist()]
    return sorted(rows)


def test_the_ranks_together_train_on_the_same_samples_however_many_there_are(tmp_path):
    source = train_data(tmp_path)
    for step in (1, 2, 9):
        alone = samples_of_step(source, step, micro_batch=8, accumulation=1, world_size=1)
        for micro_batch, accumulation, world_size in ((4, 1, 2), (2, 1, 4), (2, 4, 1), (2, 2, 2), (1, 2, 4)):
            assert samples_of_step(source, step, micro_batch, accumulation, world_size) == alone
    first, second = (samples_of_step(source, step, 8, 1, 1) for step in (1, 2))
    assert first != second


def test_the_steps_of_a_batch_size_warmup_take_the_samples_in_order_on_any_number_of_ranks(tmp_path):
    source = train_data(tmp_path)
    for micro_batch, world_size in ((4, 1), (2, 2), (1, 4), (1, 2)):
        shape = BatchShape(micro_batch, 8 // (micro_batch * world_size), world_size, 10, stages=((4, 2),))
        position = 0
        for step, samples in ((1, 4), (2, 4), (3, 8), (4, 8)):
            taken = [list(source.step_batches(step, rank, shape)) for rank in range(world_size)]
            rows = [row for micro in zip(*taken, strict=True) for batch in micro for row in batch.labels.tolist()]
            assert rows == source.batch(position, samples).labels.tolist()
            position += samples


def test_only_a_pinned_batch_is_copied_while_the_host_goes_on(monkeypatch):
    batch = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    copies = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **options: copies.append(options) or tensor)
    for is_pinned in (True, False):
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor, is_pinned=is_pinned: is_pinned)
        batch.to(torch.device("cuda"))
    assert copies == [{"non_blocking": True}] * 2 + [{"non_blocking": False}] * 2
