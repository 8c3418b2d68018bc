"""Steps that are skipped for gradients that are not finite."""

from megamoe.training.skipped import END_AFTER, WARN_AFTER, SkippedSteps


def test_skipped_steps_in_a_row_warn_once_and_then_end_the_run():
    skipped = SkippedSteps(lowers_scale=False)
    said = []
    for _ in range(END_AFTER):
        skipped.count(was_applied=False)
        said.append((skipped.warning() is not None, skipped.error() is not None))
    expected = [(False, False)] * END_AFTER
    expected[WARN_AFTER - 1] = (True, False)
    expected[END_AFTER - 1] = (False, True)
    assert said == expected


def test_an_applied_step_begins_a_new_row_but_not_a_new_window():
    skipped = SkippedSteps(lowers_scale=False)
    for was_applied in [False, True] * END_AFTER:
        skipped.count(was_applied)
        assert skipped.error() is None
    assert skipped.take_window() == END_AFTER
    assert skipped.take_window() == 0


def test_steps_that_only_lower_the_loss_scale_do_not_count():
    skipped = SkippedSteps(lowers_scale=True)
    for _ in range(END_AFTER):
        skipped.count(was_applied=False)
    assert skipped.warning() is skipped.error() is None
    assert skipped.take_window() == 0
