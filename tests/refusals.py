"""What every refusal must be: sentences that name the value, the limit and the remedy."""

import pytest

from megamoe.utils.errors import UserError


def sentences(problems):
    for problem in problems:
        assert problem.endswith((".", "?")), problem
        assert "\n" not in problem
    return problems


def complaints(function, *args):
    """What a UserError of the call says; nothing else may be raised."""
    try:
        function(*args)
    except UserError as error:
        return sentences(error.problems)
    return []


def refusals(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    return sentences(caught.value.problems)


def only(problems):
    assert len(problems) == 1, problems
    return problems[0]


def refusal(function, *args):
    return only(refusals(function, *args))


def has(problem, *parts):
    assert all(part in problem for part in parts), problem
