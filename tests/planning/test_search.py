from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
from toy import recipe_of, shipped

from megamoe.config.model import load_preset
from megamoe.config.run import Recompute
from megamoe.planning import search
from megamoe.planning.footprint import footprint
from megamoe.planning.rates import GPU
from megamoe.planning.search import best_splits, kept_free, largest_micro_batch
from megamoe.planning.sharding import read_setup
from megamoe.planning.step_time import step_time
from megamoe.utils.data_sheets import DEVICES

SETUP = read_setup(load_preset("tiny"), recipe_of(shipped("zero2"), 8), 1, 256, False)


def memory(setup):
    return footprint(setup).peak.total()


HOW, TRIED = get_args(Recompute), (2, 6, 12, 32)
SMALL = replace(DEVICES["h100"], memory=1.01 / (1 - kept_free(SETUP)) * memory(replace(SETUP, micro_batch=6)))


@pytest.mark.parametrize("samples", [None, 96])
def test_it_finds_what_trying_everything_finds(samples, monkeypatch):
    monkeypatch.setattr(search, "MICRO_BATCHES", TRIED)

    def batches():
        for micro_batch in TRIED:
            if samples is None or samples % (8 * micro_batch) == 0:
                yield micro_batch, samples // (8 * micro_batch) if samples else SETUP.accumulation

    names = "ep_size", "zero_stage", "recompute_blocks", "recompute", "micro_batch", "accumulation"
    tried = [
        replace(SETUP, **dict(zip(names, (ep_size, stage, blocks, how, *batch), strict=True)))
        for ep_size, stage, blocks, how, batch in product((1, 2, 4, 8), (1, 2), range(5), HOW, batches())
        if (stage == 2 or batch[1] > 1) and (blocks or how == "whole")
    ]
    fitting = [setup for setup in tried if memory(setup) <= (1 - kept_free(SETUP)) * SMALL.memory]
    assert len(fitting) < len(tried)
    best = max(step_time(setup, SMALL, 8, GPU).tokens_per_second for setup in fitting)
    found = best_splits(SETUP, SMALL, 8, GPU, samples)
    assert found[0].time.tokens_per_second == best
    rates = [split.time.tokens_per_second for split in found]
    assert rates == sorted(rates, reverse=True)
    assert any(split.setup.recompute_blocks for split in found)
    for split in found:
        assert split.memory == memory(split.setup) <= (1 - kept_free(SETUP)) * SMALL.memory
        if blocks := split.setup.recompute_blocks:  # none in vain
            fewer = replace(split.setup, recompute_blocks=blocks - 1)
            assert memory(fewer) > (1 - kept_free(SETUP)) * SMALL.memory
        if samples:
            assert split.setup.micro_batch * split.setup.accumulation * 8 == samples


@pytest.mark.parametrize(("fitting", "found"), [(0, 0), (1, 1), (2, 2), (7, 7), (128, 128), (150, 128)])
def test_the_largest_micro_batch_is_the_last_that_fits(fitting, found):
    limit = memory(replace(SETUP, micro_batch=fitting)) if fitting else memory(replace(SETUP, micro_batch=1)) - 1
    device = replace(SMALL, memory=(limit + 0.5) / (1 - kept_free(SETUP)))
    assert largest_micro_batch(SETUP, device) == found
