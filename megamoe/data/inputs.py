"""The files of a corpus, and the units of work that they make: a pure function of their names and sizes."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megamoe.data.readers import LINES, MAX_DOCUMENT, PACKED, TABLES, TEXT, Part, is_text, open_table, readable
from megamoe.utils.errors import Problems, UserError
from megamoe.utils.json_files import check_regular

UNIT = 64 << 20  # bytes of input in a unit of work, which becomes one shard of each split


class Unit(NamedTuple):
    """What one worker turns into shards."""

    number: int
    source: str
    parts: tuple[Part, ...]
    mask: np.ndarray | None = None  # (documents,), which of those that are selected are no duplicates; None for all

    @property
    def name(self) -> str:
        """Of its file, or of the first and the last."""
        first, last = self.parts[0].file, self.parts[-1].file
        return str(first) if first == last else f"{first} to {last}"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(part.size for part in self.parts)


def input_files(path: Path) -> list[Path]:
    """The files at `path` in order: itself, all of known kinds in the folder below it, or those of a glob. Raises
    UserError if there are none."""
    suffixes = (*TEXT, ".jsonl", *PACKED, *TABLES)  # .json describes a dataset, mostly
    if path.is_dir():  # `datasets` leaves what its `map` computes next to a dataset, as cache-*.arrow
        files = [file for file in path.rglob("*") if file.name.endswith(suffixes) and file.is_file()]
        files = sorted(file for file in files if not file.match("cache-*.arrow"))
        if not files:
            raise UserError(f"corpus {path} holds no file that ends in {', '.join(suffixes)}; give a folder that does.")
    elif path.exists():
        files = [path]
    else:
        found = sorted(glob.glob(str(path), recursive=True))  # of a folder and what is in it, perhaps
        files = list(dict.fromkeys(file for one in found for file in input_files(Path(one))))
        if not files:
            raise UserError(f"corpus {path} does not exist; give text, JSON lines, parquet, a folder or a glob.")
    for file in files:
        check_regular(file, "text")
    return files


def parts_of(file: Path, columns: Iterable[str]) -> list[Part]:
    """The ranges of a file that are read independently; none of an empty one. Raises UserError for a table that is
    truncated or lacks one of `columns`, and for a text above MAX_DOCUMENT."""
    size = check_regular(file, "text")
    if not size:
        return []
    if file.suffix in TABLES:
        with readable(file):
            table = open_table(file)
        schema = table.schema if file.suffix == ".arrow" else table.schema_arrow
        if lacks := sorted(set(columns) - set(schema.names)):
            raise UserError(
                f"{file}: has no column {', '.join(lacks)}; name the text's with --text_key, or correct --where."
            )
    if file.suffix == ".parquet":
        groups = [table.metadata.row_group(number).total_byte_size for number in range(table.num_row_groups)]
        total = max(sum(groups), 1)
        return [Part(file, number, number + 1, size * group // total) for number, group in enumerate(groups)]
    if file.suffix in LINES:
        return [Part(file, start, min(start + UNIT, size), min(UNIT, size - start)) for start in range(0, size, UNIT)]
    if size > MAX_DOCUMENT and is_text(file):
        raise UserError(
            f"{file}: is one document of {size:,} bytes, above the limit of {MAX_DOCUMENT:,}; cut it into several "
            "files, or into JSON lines."
        )
    return [Part(file, 0, size, size)]


def units_of(sources: dict[str, list[Path]], columns: Iterable[str]) -> list[Unit]:
    """The units of all sources, in order. Raises one UserError with the problems of all files.

    Args:
        columns: that each table must have.
    """
    problems = Problems()
    units: list[Unit] = []
    for source, files in sources.items():
        parts = [part for file in files for part in problems.attempt(parts_of, file, columns) or []]
        units += [Unit(number, source, one) for number, one in enumerate(_grouped(parts), len(units))]
    problems.refuse()
    return units


def _grouped(parts: list[Part]) -> list[tuple[Part, ...]]:
    """As many at a time as have UNIT bytes; neighbours in a file become one part, which is read in one go."""
    groups: list[list[Part]] = []
    size = 0
    for part in parts:
        if not groups or size + part.size > UNIT:
            groups.append([])
            size = 0
        size += part.size
        before = groups[-1][-1:]
        if before and (before[0].file, before[0].stop) == (part.file, part.start):
            groups[-1][-1] = before[0]._replace(stop=part.stop, size=before[0].size + part.size)
        else:
            groups[-1].append(part)
    return [tuple(group) for group in groups]
