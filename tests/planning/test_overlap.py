"""What backward hides of the reductions, against timelines by hand, and the buckets against those of the memory."""

from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
from toy import SLOW, recipe_of, shipped

from megamoe.config.model import load_preset
from megamoe.planning import sharding
from megamoe.planning.buckets import Reduction
from megamoe.planning.footprint import footprint
from megamoe.planning.model_trace import model_trace
from megamoe.planning.overlap import Bucket, buckets, seconds_not_hidden
from megamoe.planning.rates import GPU
from megamoe.planning.sharding import parameter_groups, read_setup
from megamoe.planning.step_time import step_time
from megamoe.planning.sums import ReduceOnce
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
def test_buckets_are_those_of_the_memory(bucket):
    setup, flushed, flush = replace(SETUP, bucket=bucket), [], Reduction.flush

    def recorded(reduction):
        groups = [reduction.groups[reduction.group_of[name]] for name in reduction.waiting]
        flushed.append(Counter())
        for name, group in zip(reduction.waiting, groups, strict=True):
            flushed[-1][group.expert] += group.sizes[name]
        return flush(reduction)

    with mock.patch.object(Reduction, "flush", recorded):
        footprint(setup)
    found = buckets(setup, parameter_groups(setup), model_trace(setup))
    assert [one.elements for one in found] == [elements for elements in flushed if elements]
    assert sum(one.share for one in found) == pytest.approx(1)


def test_what_is_reduced_once_goes_by_groups_when_their_first_block_is_done(monkeypatch):
    monkeypatch.setattr(sharding, "EXPERT_GROUP", 2**20)  # two of four blocks, on a rank with all experts
    setup, begun, reduce = replace(SETUP, zero_stage=1, ep_size=1), [], ReduceOnce.reduce
    monkeypatch.setattr(ReduceOnce, "reduce", lambda self, number: begun.append(number) or reduce(self, number))
    footprint(setup)
    groups = parameter_groups(setup)
    found = buckets(setup, groups, model_trace(setup))
    assert [one.elements for one in found if one.elements] == [
        {groups[number].expert: sum(groups[number].sizes.values())} for number in begun
    ]
    assert [one.elements.keys() for one in found[:2]] == [{True}] * 2
    assert [one.share for one in found[:2]] == pytest.approx([0.5, 0.5], abs=0.03)  # attention's come last in a block


def not_hidden(setup):
    phases = step_time(setup, SLOW, 8, GPU).phases
    return next(phase.seconds for phase in phases if phase.name == "gradients, not hidden")


def test_a_step_waits_for_what_no_pass_hides():
    setup = replace(SETUP, accumulation=4, bucket=10**5)
    reduced = sum(one.seconds(SLOW, 8, GPU.links) for one in collectives(setup) if "reduction" in one.phase)
    assert not_hidden(replace(setup, overlap=False)) == pytest.approx(reduced)
    assert 0 < not_hidden(setup) < reduced
    assert not_hidden(setup) == pytest.approx(4 * not_hidden(replace(setup, accumulation=1)), rel=1e-3)
