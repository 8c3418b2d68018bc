"""Steps that are skipped for gradients that are not finite."""

from megamoe.training.skipped import END_AFTER, WARN_AFTER, SkippedSteps


def test_skipped_steps_in_a_row_warn_once_and_then_end_the_run():
    skipped = SkippedSteps()
    said = []
    for _ in range(END_AFTER):
        skipped.count(was_applied=False)
        said.append((skipped.warning() is not None, skipped.error() is not None))
    expected = [(False, False)] * END_AFTER
    expected[WARN_AFTER - 1] = (True, False)
    expected[END_AFTER - 1] = (False, True)
    assert said == expected


def test_an_applied_step_begins_a_new_row_and_a_save_counts_those_since_the_one_before():
    skipped = SkippedSteps()
    for was_applied in [False, True] * END_AFTER:
        skipped.count(was_applied)
        assert skipped.error() is None
    assert skipped.take() == END_AFTER
    skipped.count(was_applied=False)
    assert skipped.take() == 1
