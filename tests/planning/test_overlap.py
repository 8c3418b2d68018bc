"""What backward hides of the reductions, against timelines by hand, and the buckets against those of the memory."""

from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
from toy import recipe_of, shipped

from megamoe.config.model import load_preset
from megamoe.planning.buckets import Reduction
from megamoe.planning.footprint import footprint
from megamoe.planning.model_trace import model_trace
from megamoe.planning.overlap import Bucket, buckets, seconds_not_hidden
from megamoe.planning.rates import GPU
from megamoe.planning.sharding import parameter_groups, read_setup
from megamoe.planning.step_time import step_time
from megamoe.planning.traffic import collectives
from megamoe.utils.hardware import DEVICES, Device

SETUP = read_setup(load_preset("tiny"), recipe_of(shipped("zero2"), 16), 4, 256, False)
SLOW = Device("slow", 1e12, 1e12, 1e9, 1e9, inside=1e5, between=1e5, host=1e6, host_memory_rate=1e8)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({False: 0.0, True: 0.0}, 0),
        ({False: 1.0, True: 2.0}, 0.5),  # each is done before the next: the last alone, half of the shared weights
        ({False: 0.0, True: 8.0}, 4 - 2),  # the second, of 4 s, while the third fills for 2
        ({False: 6.0, True: 8.0}, (3 - 2) + (4 - 2) + 3),
    ],
)
def test_a_reduction_hides_behind_the_bucket_that_fills_meanwhile_alone(seconds, expected):
    found = [
        Bucket(0.6, Counter({False: 5})),
        Bucket(0.2, Counter({True: 3})),
        Bucket(0.2, Counter({True: 3, False: 5})),
    ]
    late = seconds[True] / 2  # with the third's shared weights
    assert seconds_not_hidden(found, 10.0, seconds) == pytest.approx(expected + late)
    assert seconds_not_hidden([Bucket(1.0, Counter({False: 1}))], 10.0, {False: 3.0, True: 0.0}) == 3


@pytest.mark.parametrize("bucket", [10**4, 10**5, 10**6, 10**9])
def test_buckets_are_those_of_the_memory(bucket):
    setup = replace(SETUP, bucket=bucket)
    flushed = []

    def flush(reduction):
        elements = Counter()
        for name in reduction.waiting:
            group = reduction.groups[reduction.group_of[name]]
            elements[group.expert] += group.sizes[name]
        flushed.append(elements)
        return real(reduction)

    real = Reduction.flush
    with mock.patch.object(Reduction, "flush", flush):
        footprint(setup)
    found = buckets(setup, parameter_groups(setup), model_trace(setup))
    assert [one.elements for one in found] == [elements for elements in flushed if elements]
    assert sum(one.share for one in found) == pytest.approx(1)


def not_hidden(setup):
    time = step_time(setup, SLOW, 8, GPU)
    return next(phase.seconds for phase in time.phases if phase.name == "gradients, not hidden")


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_step_waits_for_what_no_pass_hides(zero_stage):
    setup = replace(SETUP, accumulation=4, zero_stage=zero_stage, bucket=10**5)
    reduced = sum(one.seconds(SLOW, 8, GPU.links) for one in collectives(setup) if one.phase == "reduction")
    assert not_hidden(replace(setup, overlap=False)) == pytest.approx(reduced)
    assert 0 < not_hidden(setup) < reduced
    one_pass = replace(setup, accumulation=1)
    assert not_hidden(setup) == pytest.approx(not_hidden(one_pass) * (4 if zero_stage == 2 else 1), rel=1e-3)
    whole = replace(setup, bucket=10**9)  # one bucket, which is reduced when backward is over
    assert not_hidden(whole) == pytest.approx(not_hidden(replace(whole, overlap=False)))


def test_over_several_nodes_a_step_takes_longer_than_if_all_of_backward_hid_its_reductions():
    setup = read_setup(load_preset("moe-16b"), recipe_of(shipped("zero2"), 64), 8, 4096, False)
    time = step_time(setup, DEVICES["h100"], 8, GPU)
    seconds = {phase.name: phase.seconds for phase in time.phases}
    reduced = sum(one.seconds(DEVICES["h100"], 8, GPU.links) for one in collectives(setup) if one.phase == "reduction")
    assert seconds["gradients, not hidden"] > max(reduced - seconds["backward"], 0) > 0
