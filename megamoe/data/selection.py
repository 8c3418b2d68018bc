"""Which documents of the input a corpus takes: conditions on their columns, limits of length, exact duplicates."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from megamoe.data.inputs import Unit
from megamoe.data.readers import read_part
from megamoe.utils.errors import UserError, shown

OPERATORS: dict[str, Any] = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "=": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


class Condition(NamedTuple):
    """One of `--where`. A record without the key, or with null there, is unequal to all but "null"."""

    key: str
    operator: str
    value: str

    def holds(self, record: dict[str, Any]) -> bool:
        """Compares by the type of the record's value. Raises ValueError where that cannot be."""
        found = record.get(self.key)
        if found is None or self.value == "null":
            are_equal = found is None and self.value == "null"
            return {"=": are_equal, "!=": not are_equal}.get(self.operator, False)
        if isinstance(found, (bool, str)):
            return OPERATORS[self.operator](found if isinstance(found, str) else str(found).lower(), self.value)
        try:
            return OPERATORS[self.operator](found + 0.0, float(self.value))
        except (ValueError, TypeError):
            where = shown(self.key + self.operator + self.value)
            raise ValueError(f"has {shown(found)} under {shown(self.key)}; correct --where {where}") from None


def parse_condition(text: str) -> Condition:
    """KEY, an operator and a value, such as "score>=0.5". Raises UserError."""
    parts = re.fullmatch(r"([^<>=!]+)(>=|<=|!=|=|>|<)(.*)", text, re.DOTALL)
    if not parts:
        raise UserError(f"--where {shown(text)} is no condition; give KEY=VALUE, or one with !=, >, >=, <, <=.")
    return Condition(*(part.strip() for part in parts.groups()))


class Selection(NamedTuple):
    """Documents of units; the same ones in every process."""

    text_key: str = "text"
    where: tuple[Condition, ...] = ()
    min_chars: int = 1
    max_chars: int | None = None

    @property
    def columns(self) -> list[str]:
        """Those that are read of tables, the text's first."""
        return list(dict.fromkeys([self.text_key, *(condition.key for condition in self.where)]))

    def read(self, unit: Unit, dropped: Counter[str] | None = None) -> Iterator[str]:
        """The documents of a unit, in order. Raises UserError as `read_part`.

        Args:
            dropped: counts the others by reason.
        """
        for part in unit.parts:
            for text in read_part(part, self.columns, lambda record: all(one.holds(record) for one in self.where)):
                reason = self._refusal(text)
                if text is not None and not reason:
                    yield text
                elif dropped is not None:
                    dropped[reason] += 1

    def hashes(self, unit: Unit) -> np.ndarray:
        """(documents,) uint64: of the text of each."""
        digests = [blake2b(text.encode(), digest_size=8).digest() for text in self.read(unit)]
        return np.frombuffer(b"".join(digests), np.uint64)

    def _refusal(self, text: str | None) -> str:
        if text is None:
            return "where"
        if not text or text.isspace():
            return "empty"
        if len(text) < self.min_chars:
            return "short"
        return "long" if self.max_chars is not None and len(text) > self.max_chars else ""


def first_occurrences(hashes: list[np.ndarray]) -> list[np.ndarray]:
    """For each unit which of its documents (a mask) are the first with their hash, in the order of the units."""
    everything = np.concatenate(hashes)
    is_first = np.zeros(len(everything), bool)
    is_first[np.unique(everything, return_index=True)[1]] = True
    return np.split(is_first, np.cumsum([len(one) for one in hashes])[:-1])
