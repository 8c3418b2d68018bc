"""The windows of every evaluation: each token of a text is predicted once. Their sums, at any number of ranks:
tests/commands/test_evaluate.py."""

import numpy as np
import pytest

from megamoe.data.source import NO_LABEL
from megamoe.evaluation.scoring import windows_of

BEFORE = 3


@pytest.mark.parametrize("total", [1, 8, 9, 23])
@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 3), (8, 1), (64, 64), (64, 1)])
def test_every_token_is_predicted_once_with_what_stands_before_it(length, stride, total):
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
