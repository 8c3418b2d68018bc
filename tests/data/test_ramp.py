"""Samples per optimizer step, where they rise during a run."""

from megamoe.data.ramp import BatchRamp

RAMP = BatchRamp(64, ((16, 5), (32, 9)))


def test_a_step_begins_where_the_steps_before_it_have_ended():
    for ramp in (RAMP, BatchRamp(64), BatchRamp(4, ((2, 1),))):
        for step in range(1, 15):
            assert ramp.samples_before(step) == sum(ramp.samples_of(earlier) for earlier in range(1, step))


def test_each_stage_lasts_up_to_and_with_its_last_step():
    assert [RAMP.samples_of(step) for step in (1, 5, 6, 9, 10, 1000)] == [16, 16, 32, 32, 64, 64]


def test_the_first_step_that_differs_between_two_ramps_is_found():
    for stages, full, step in (
        (((16, 5), (32, 9)), 64, None),
        (((16, 6), (32, 9)), 64, 6),
        (((16, 5), (32, 8)), 64, 9),
        (((16, 5), (32, 9), (48, 12)), 64, 10),
        (((16, 5), (32, 9)), 48, 10),
        (((16, 5), (24, 7), (32, 9)), 64, 6),
        ((), 64, 1),
    ):
        other = BatchRamp(full, stages)
        assert RAMP.first_difference(other) == other.first_difference(RAMP) == step
