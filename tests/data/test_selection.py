"""Which documents a corpus takes."""

import random
from collections import Counter

import numpy as np
import pytest
from refusals import has, refusal

from megamoe.data.selection import first_occurrences, parse_condition

RECORD = {
    "score": 0.5,
    "count": 10,
    "lang": "en",
    "number": "9",
    "good": True,
    "nothing": None,
    "list": [1],
    "huge": 10**400,
}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("score>=0.5", True), ("score>0.5", False), ("count<11", True), ("count<9", False), ("count=10.0", True),
        ("lang=en", True), ("lang!=en", False), ("number<10", False), ("good=true", True), ("good=false", False),
        ("lang!=null", True), ("lang=null", False), ("nothing=null", True), ("nothing!=null", False),
        ("nothing!=en", True), ("nothing<5", False), ("absent=en", False), ("lang = a=b", False),
    ],
)  # fmt: skip
def test_a_condition_compares_by_the_type_of_the_value(condition, expected):
    assert parse_condition(condition).holds(RECORD) is expected


def test_what_cannot_be_compared_is_refused():
    for text in ("score", ">=3", "=en", ""):
        has(refusal(parse_condition, text), "no condition", "give KEY=VALUE")
    for condition, part in (("score<many", "score<many"), ("list=1", "[1]"), ("huge>1", "1000")):
        with pytest.raises(ValueError, match="correct --where") as caught:
            parse_condition(condition).holds(RECORD)
        assert part in str(caught.value)


def test_the_first_of_equal_hashes_is_kept_in_the_order_of_units():
    draw = random.Random(3)
    hashes = [[draw.randrange(40) for _ in range(draw.randrange(30))] for _ in range(9)]
    seen, expected = Counter(), []
    for unit in hashes:
        expected.append([seen.update([one]) or seen[one] == 1 for one in unit])
    found = first_occurrences([np.array(unit, np.uint64) for unit in hashes])
    assert [mask.tolist() for mask in found] == expected
