"""What backward hides of the reductions, against timelines by hand, and what is reduced together."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from toy import SLOW, recipe_of, shipped

from megamoe.config.model import load_preset
from megamoe.planning import sharding
from megamoe.planning.model_trace import model_trace
from megamoe.planning.overlap import Bucket, buckets, seconds_not_hidden
from megamoe.planning.rates import GPU
from megamoe.planning.sharding import parameter_groups, read_setup
from megamoe.planning.step_time import step_time
from megamoe.planning.traffic import collectives

SETUP = read_setup(load_preset("tiny"), recipe_of(shipped("zero2"), 16), 4, 256, False)


@pytest.mark.parametrize(
    ("shared", "experts", "expected"),
    [
        (0, 0, 0),
        (1, 2, 0.5 + 1),  # each is done before the next: the last alone, half of both
        (0, 8, (4 - 2) + 4),  # the second, while the third fills for 2 s, and the last
        (6, 8, (3 - 2) + (4 - 2) + 7),
    ],
)
def test_a_reduction_hides_behind_the_bucket_that_fills_meanwhile_alone(shared, experts, expected):
    elements = [{False: 5}, {True: 3}, {True: 3, False: 5}]
    found = [Bucket(share, Counter(one)) for share, one in zip((0.6, 0.2, 0.2), elements, strict=True)]
    assert seconds_not_hidden(found, 10.0, {False: shared, True: experts}, waits=True) == pytest.approx(expected)
    # Waited for by the second bucket, for 7 s, and not hidden by the long third; then the last.
    slow_first = [Bucket(share, Counter({False: size})) for share, size in ((0.1, 8), (0.1, 1), (0.8, 1))]
    assert seconds_not_hidden(slow_first, 10.0, {False: 10.0, True: 0.0}, waits=True) == pytest.approx(7 + 1)
    # Not waited for, the first ends 9 s after the start, the second 1 s later, with the pass; then the last.
    assert seconds_not_hidden(slow_first, 10.0, {False: 10.0, True: 0.0}, waits=False) == pytest.approx(1)


@pytest.mark.parametrize("bucket", [10**4, 10**6, 10**9])
def test_buckets_hold_each_gradient_once_and_are_reduced_when_the_next_does_not_fit(bucket):
    setup = replace(SETUP, bucket=bucket)
    groups = parameter_groups(setup)
    found = buckets(setup, groups, model_trace(setup))
    largest = max(size for group in groups for size in group.sizes.values())
    assert max(one.elements.total() for one in found) <= max(bucket, largest)
    assert all(one.elements.total() + other.elements.total() > bucket for one, other in itertools.pairwise(found))
    whole = sum((one.elements for one in found), Counter())
    assert whole[True] == sum(sum(group.sizes.values()) for group in groups if group.expert)
    assert whole.total() == sum(sum(group.sizes.values()) for group in groups)
    assert sum(one.share for one in found) == pytest.approx(1)


def test_what_is_reduced_once_goes_by_groups_when_their_first_block_is_done(monkeypatch):
    monkeypatch.setattr(sharding, "EXPERT_GROUP", 2**20)  # two of four blocks, on a rank with all experts
    setup = replace(SETUP, zero_stage=1, ep_size=1)
    found = buckets(setup, parameter_groups(setup), model_trace(setup))
    assert [one.elements.keys() for one in found] == [{True}, {True}, {False}, {False}]
    assert [one.elements[True] for one in found[:2]] == [2**20] * 2
    assert [one.share for one in found[:2]] == pytest.approx([0.5, 0.5], abs=0.03)  # attention's come last in a block
    assert sum(one.share for one in found) == pytest.approx(1)


def not_hidden(setup):
    phases = step_time(setup, SLOW, 8, GPU).phases
    return next(phase.seconds for phase in phases if phase.name == "gradients, not hidden")


def test_a_step_waits_for_what_no_pass_hides():
    setup = replace(SETUP, accumulation=4, bucket=10**5)
    reduced = sum(one.seconds(SLOW, 8, GPU.links) for one in collectives(setup) if "reduction" in one.phase)
    assert not_hidden(replace(setup, overlap=False)) == pytest.approx(reduced)
    assert 0 < not_hidden(setup) < reduced
    assert not_hidden(setup) == pytest.approx(4 * not_hidden(replace(setup, accumulation=1)), rel=1e-3)
