"""Which data a step reads after a run has gone back."""

import pytest

from megamoe.checkpoint import folders
from megamoe.data.ledger import NAME, DataLedger, read_ledger
from megamoe.utils.errors import UserError


def read_of(returns, last):
    """(the data steps of all steps that were trained, those of the run as it ends) by simulation.

    Args:
        returns: (after step, back to).
    """
    ledger, step, pending = DataLedger(), 0, list(returns)
    read, of_step = [], {}
    while step < last:
        step += 1
        of_step[step] = ledger.data_step(step)
        read.append(of_step[step])
        if pending and pending[0][0] == step:
            _, back = pending.pop(0)
            ledger = ledger.gone_back(back, ledger.data_step(step), generation=0)
            step = back
    return ledger, read, of_step


@pytest.mark.parametrize("returns", [[(8, 5)], [(8, 5), (12, 3)], [(8, 5), (9, 5), (20, 12)], [(8, 0), (3, 2)]])
def test_no_data_is_read_twice_or_left_out_and_each_step_of_the_run_keeps_its_data(returns, tmp_path):
    ledger, read, of_step = read_of(returns, 25)
    assert read == list(range(1, len(read) + 1))
    assert {step: ledger.data_step(step) for step in of_step} == of_step
    assert ledger.rollbacks == len(returns)
    ledger.write(tmp_path)
    assert read_ledger(tmp_path) == ledger


def test_a_ledger_that_no_run_has_written_is_refused_with_its_path(tmp_path):
    (tmp_path / NAME).write_text('{"rollbacks": 1, "entries": [{"after_step": -1, "offset": 0, "generation": 0}]}')
    with pytest.raises(UserError, match=r"data_ledger.json.*after_step"):
        read_ledger(tmp_path)


def test_checkpoints_that_the_run_has_gone_back_from_are_not_found_any_more(tmp_path):
    for name in ("step_5", "step_10", "step_15", "step_12.1", "step_20.2"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    ledger = DataLedger().gone_back(5, 16, generation=1)
    assert [path.name for path in folders.run_checkpoints(tmp_path / "checkpoints", ledger)] == [
        "step_20.2", "step_12.1", "step_5",
    ]  # fmt: skip
    ledger.gone_back(12, 30, generation=2).write(tmp_path)
    assert [path.name for path in folders.found_at(tmp_path)] == ["step_20.2", "step_12.1", "step_5"]
