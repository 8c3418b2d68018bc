"""Which documents of the input a corpus takes, and which of them are held out: conditions on their columns, limits of
length, exact duplicates, every k-th."""

from __future__ import annotations

import itertools
import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BeforeValidator, Field

from megamoe.config.cli import Options
from megamoe.config.run import ONE_WORD_EACH
from megamoe.data.inputs import Unit, parts_of
from megamoe.data.readers import is_text, place_of, read_records
from megamoe.utils.errors import UserError, shown

SPLITS = ("train", "valid")
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
            return OPERATORS[self.operator](float(found), float(self.value))
        except (ValueError, TypeError, OverflowError):
            where = shown("".join(self))
            raise ValueError(f"has {shown(found)} under {shown(self.key)}; correct --where {where}") from None


def parse_condition(text: str) -> Condition:
    """KEY, an operator and a value, such as "score>=0.5". Raises ValueError."""
    parts = re.fullmatch(r"([^<>=!]+)(>=|<=|!=|=|>|<)(.*)", text, re.DOTALL)
    if not parts:
        raise ValueError(f"{shown(text)} is no condition; give KEY=VALUE, or one with !=, >, >=, <, <=.")
    return Condition(*(part.strip() for part in parts.groups()))


class Selection(Options, group="Documents"):
    """Which documents of units are taken, and for which split; the same ones in every process."""

    text_key: str = Field(default="text", description="key of the text in JSON lines, its column in tables")
    where: Annotated[list[Annotated[Condition, BeforeValidator(parse_condition)]], ONE_WORD_EACH] = Field(
        default=[], description="take only documents with, such as 'score>=0.5' lang=en"
    )
    min_chars: int = Field(default=1, description="drop shorter documents")
    max_chars: int | None = Field(default=None, description="drop longer documents")
    valid_fraction: float = Field(
        default=0.05,
        ge=0,
        le=0.5,
        description="share F of the text that is held out: every round(1/F)-th document of each 64 MiB",
    )

    @property
    def columns(self) -> list[str]:
        """Those that are read of tables, the text's first."""
        return list(dict.fromkeys([self.text_key, *(condition.key for condition in self.where)]))

    def read(self, unit: Unit, dropped: Counter[str] | None = None) -> Iterator[str]:
        """The documents of a unit, in order. Raises UserError, naming file and place, for what cannot be read or has
        no text.

        Args:
            dropped: counts the others by reason.
        """
        is_first = itertools.repeat(True) if unit.mask is None else iter(unit.mask)
        for part in unit.parts:
            where = [] if is_text(part.file) else self.where  # a text has no other columns
            for position, record in read_records(part, self.columns):
                try:
                    reason = self._refusal(record, where)
                except ValueError as error:
                    raise UserError(f"{part.file}: {place_of(part.file, position)} {error}.") from None
                if not reason and next(is_first):
                    yield record[self.text_key]
                elif dropped is not None:
                    dropped[reason or "duplicate"] += 1

    def hashes(self, unit: Unit) -> np.ndarray:
        """(documents,) uint64: of the text of each."""
        digests = [blake2b(text.encode(), digest_size=8).digest() for text in self.read(unit)]
        return np.frombuffer(b"".join(digests), np.uint64)

    def _refusal(self, record: Any, where: list[Condition]) -> str | None:
        """Why a record is not taken, if it is not. Raises ValueError where that cannot be said."""
        if isinstance(record, dict) and not all(condition.holds(record) for condition in where):
            return "where"
        text = record.get(self.text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            key = self.text_key
            raise ValueError(
                f'has no text under "{key}"; name the key with --text_key, or leave it out with --where "{key}!=null"'
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair, which is no character; remove it") from None
        if not text or text.isspace():
            return "empty"
        if len(text) < self.min_chars:
            return "short"
        return "long" if self.max_chars is not None and len(text) > self.max_chars else None


def read_documents(files: Iterable[Path], text_key: str) -> Iterator[str]:
    """The non-empty documents in `files`. Raises UserError as `Selection.read`."""
    parts = (part for file in files for part in parts_of(file, [text_key]))
    return Selection(text_key=text_key).read(Unit(0, "", tuple(parts)))


def without_duplicates(units: list[Unit], hashes: list[np.ndarray]) -> list[Unit]:
    """Units with masks of the first documents with their hash, in the order of the units."""
    everything = np.concatenate(hashes)
    is_first = np.zeros(len(everything), bool)
    is_first[np.unique(everything, return_index=True)[1]] = True
    masks = np.split(is_first, np.cumsum([len(one) for one in hashes])[:-1])
    return [unit._replace(mask=mask) for unit, mask in zip(units, masks, strict=True)]


def split_documents(documents: Iterable[str], valid_fraction: float) -> Iterator[tuple[str, str]]:
    """("train" or "valid", document) pairs. Every k-th document is held out, k = 1 / valid_fraction.

    With fewer than k documents, the last part of each is held out instead, cut at a line's end where there is one.
    """
    if not valid_fraction:
        yield from (("train", document) for document in documents)
        return
    every = max(round(1 / valid_fraction), 2)
    documents = iter(documents)
    first = list(itertools.islice(documents, every))
    if len(first) == every:
        for number, document in enumerate(itertools.chain(first, documents), start=1):
            yield ("valid" if number % every == 0 else "train"), document
        return
    for document in first:
        cut = int(len(document) * (1 - valid_fraction))
        cut = document.find("\n", cut, -1) + 1 or cut
        if document[:cut].strip() and document[cut:].strip():
            yield "train", document[:cut]
            yield "valid", document[cut:]
        else:
            yield "train", document
