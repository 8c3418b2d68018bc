"""The sums behind every evaluation: each token of a text is predicted once, whatever the windows, ranks and batches."""

import numpy as np
import pytest
import torch
from exported import random_decoder
from model_parts import model_of
from ranks import run_ranks

from megamoe.data.batches import NO_LABEL
from megamoe.evaluation.scoring import Share, score, windows_of

LENGTHS = (1, 9, 30, 4, 17)
BEFORE = 3


def texts():
    draw = np.random.default_rng(5)
    return [draw.integers(0, 101, length) for length in LENGTHS]


def all_windows(length, stride):
    return [window for owner, ids in enumerate(texts()) for window in windows_of(ids, BEFORE, length, stride, owner)]


@pytest.mark.parametrize("total", [1, 8, 9, 23])
def test_every_token_is_predicted_once_with_what_stands_before_it(total):
    for length, stride in ((8, 8), (8, 3), (8, 1), (64, 64), (64, 1)):
        check_windows(length, stride, total)


def check_windows(length, stride, total):
    ids = np.arange(100, 100 + total)
    predicted = []
    for window in windows_of(ids, BEFORE, length, stride, owner=2):
        assert 1 <= len(window.ids) == len(window.labels) <= length
        assert window.owner == 2
        for place, label in enumerate(window.labels):
            if label != NO_LABEL:
                before = [BEFORE, *ids.tolist()][: len(predicted) + 1]
                seen = window.ids[: place + 1].tolist()
                assert seen == before[-len(seen) :]
                assert len(seen) >= min(len(before), length - stride + 1)
                predicted.append(label)
    assert predicted == ids.tolist()


def scored(length, stride, micro_batch):
    decoder = random_decoder(model_of("latent_tokens"))
    rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size())
    windows = all_windows(length, stride)
    return score(decoder, iter(windows), len(LENGTHS), Share(micro_batch, rank, world_size), torch.device("cpu"))


@torch.no_grad()
def expected(length, stride):
    """By one window at a time, in float64, from the logits."""
    decoder = random_decoder(model_of("latent_tokens")).double()
    sums = torch.zeros(len(LENGTHS), 3, dtype=torch.float64)
    for ids, labels, owner in all_windows(length, stride):
        logits = decoder(torch.from_numpy(ids)[None])[0].log_softmax(-1)
        for row, label in zip(logits, labels, strict=True):
            if label != NO_LABEL:
                sums[owner] += torch.stack((-row[label], torch.ones(()), (row.argmax() != label).double()))
    return sums


@pytest.mark.parametrize(("world_size", "micro_batch", "stride"), [(1, 50, 8), (2, 3, 3)])
def test_sums_are_those_of_the_logits_at_any_number_of_ranks(world_size, micro_batch, stride):
    of_ranks = run_ranks(world_size, scored, 8, stride, micro_batch)
    for sums in of_ranks:
        assert torch.equal(sums, of_ranks[0])
        assert torch.equal(sums[:, 1], torch.tensor(LENGTHS, dtype=torch.float64))
        torch.testing.assert_close(sums, expected(8, stride), rtol=1e-6, atol=1e-6)
