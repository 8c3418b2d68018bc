"""Which documents a corpus takes, and which of them are held out."""

import itertools
import random
import re
from collections import Counter

import numpy as np
import pytest

from megamoe.data.inputs import Unit
from megamoe.data.selection import parse_condition, split_documents, without_duplicates

RECORD = {
    "score": 0.5, "count": 10, "lang": "en", "number": "9", "good": True, "nothing": None, "list": [1], "huge": 10**400,
}  # fmt: skip


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


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("score", "give KEY=VALUE"), (">=3", "give KEY=VALUE"), ("=en", "give KEY=VALUE"), ("", "give KEY=VALUE"),
        ("score<many", "correct --where \"score<many"), ("list=1", 'has [1] under "list"'), ("huge>1", "has 1000"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(condition, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_condition(condition).holds(RECORD)


def test_the_first_of_equal_hashes_is_kept_in_the_order_of_units():
    draw = random.Random(3)
    hashes = [[draw.randrange(40) for _ in range(draw.randrange(30))] for _ in range(9)]
    seen, expected = Counter(), []
    for unit in hashes:
        expected.append([seen.update([one]) or seen[one] == 1 for one in unit])
    units = [Unit(number, "a", ()) for number in range(9)]
    found = without_duplicates(units, [np.array(unit, np.uint64) for unit in hashes])
    assert [unit.mask.tolist() for unit in found] == expected


def splits(documents, fraction):
    pairs = list(split_documents(iter(documents), fraction))
    assert "".join(text for _, text in pairs) == "".join(documents)
    assert all(text.strip() for _, text in pairs)
    return [[text for split, text in pairs if split == name] for name in ("train", "valid")]


def test_every_kth_document_is_held_out():
    for fraction, every, more in ((0.5, 2, 7), (0.25, 4, 1), (0.05, 20, 0), (0.01, 100, 7)):
        documents = [f"document {number}" for number in range(every + more)]
        train = [text for number, text in enumerate(documents, start=1) if number % every]
        assert splits(documents, fraction) == [train, documents[every - 1 :: every]]


def test_of_few_documents_the_ends_of_lines_are_held_out_and_every_character_is_in_one_split():
    draw = random.Random(1)
    for count, fraction in itertools.product((1, 3, 19, 20, 45), (0.05, 0.2, 0.37, 0.5)):
        splits(["".join(draw.choices("ab \n", k=draw.randrange(40, 90))) + "end" for _ in range(count)], fraction)
    documents = ["".join(f"line {number} of {name}\n" for number in range(100)) for name in "abcdefghi"]
    for kept, held, document in zip(*splits(documents, 0.1), documents, strict=True):
        assert kept.endswith("\n")
        assert 0.1 * len(document) - len("line 99 of a\n") < len(held) <= 0.1 * len(document)
    for document in ("a", "ab\n", "\n\n\n\nx", "x\n\n\n\n\n\n\n\n\n\n", "line\n" * 10 + "\n" * 20):
        splits([document], 0.05)
