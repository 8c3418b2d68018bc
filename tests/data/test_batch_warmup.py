"""Samples per optimizer step, where they rise during a run."""

from megamoe.data.batch_warmup import BatchWarmup

WARMUP = BatchWarmup(64, ((16, 5), (32, 9)))


def test_a_step_begins_where_the_steps_before_it_have_ended():
    for warmup in (WARMUP, BatchWarmup(64), BatchWarmup(4, ((2, 1),))):
        for step in range(1, 15):
            assert warmup.samples_before(step) == sum(warmup.samples_of(earlier) for earlier in range(1, step))


def test_each_stage_lasts_up_to_and_with_its_last_step():
    assert [WARMUP.samples_of(step) for step in (1, 5, 6, 9, 10, 1000)] == [16, 16, 32, 32, 64, 64]
