"""Steps that are skipped for gradients that are not finite; what a run says of many: tests/test_pretrain.py."""

from megamoe.training.skipped import END_AFTER, SkippedSteps


def test_an_applied_step_begins_a_new_row_and_a_save_counts_those_since_the_one_before():
    skipped = SkippedSteps()
    for was_applied in [False, True] * END_AFTER:
        skipped.count(was_applied)
        assert skipped.error() is None
    assert skipped.take() == END_AFTER
    skipped.count(was_applied=False)
    assert skipped.take() == 1
