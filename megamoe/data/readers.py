"""Records of text, JSON lines (plain or packed), parquet and Arrow files (what `datasets` saves), with their places."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megamoe.utils.errors import UserError, first_line

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# Endings of the names of files.
TEXT = (".txt", ".md", ".text")
LINES = (".jsonl", ".json")
PACKED = (".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
TABLES = (".parquet", ".arrow")
MAX_DOCUMENT = 1 << 30  # bytes; a document is held in memory several times
CHUNK = 1 << 24


class Part(NamedTuple):
    """A range of one file."""

    file: Path
    start: int  # byte of plain JSON lines, row group of parquet; 0 for a file that is read whole
    stop: int
    size: int  # bytes on disk


def is_text(file: Path) -> bool:
    """Whether a file is one document."""
    return not file.name.endswith(LINES + PACKED + TABLES)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turns what libraries raise for a damaged file into a UserError."""
    try:
        yield
    except (OSError, EOFError, ValueError, NotImplementedError, zlib.error, zstd.ZstdError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}); replace the file.") from None


def open_lines(file: Path) -> Any:
    """JSON lines, unpacked, as a binary stream."""
    return {".gz": gzip.open, ".zst": zstd.open}.get(file.suffix, open)(file, "rb")  # type: ignore[operator]


def open_table(file: Path) -> Any:
    """A ParquetFile, or the reader of an Arrow stream. Raises UserError without pyarrow."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: needs pyarrow, which is not installed; pip install 'megamoe[parquet]'.") from None
    if file.suffix == ".arrow":
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
    return pyarrow.parquet.ParquetFile(file)


def read_records(part: Part, columns: list[str]) -> Iterator[tuple[int, Any]]:
    """(position, record) pairs: a line of JSON lines, a row of a table, the whole of a text file.

    Args:
        columns: to read of tables; the first is that of the text.

    Raises UserError, naming file and place, for what is truncated or undecodable.
    """
    with readable(part.file):
        if is_text(part.file):
            yield 0, {columns[0]: _decoded(part.file, part.file.read_bytes())}
        elif part.file.suffix in TABLES:
            yield from _rows(part, columns)
        else:
            yield from _json_lines(part)


def place_of(file: Path, position: int) -> str:
    """Says where a record lies: its row in a table, its line and byte in JSON lines, which are counted only then."""
    if file.suffix in TABLES:
        return f"row {position + 1}"
    number, left = 1, position
    with open_lines(file) as stream:
        while left and (chunk := stream.read(min(left, CHUNK))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return f"line {number} (byte {position:,})"


def _decoded(file: Path, data: bytes, position: int | None = None) -> str:
    """The text in `data`, which is all of a file or its line at `position`."""
    wrong = data.find(b"\0")  # valid UTF-8, but a binary file holds it nearly always, and a text never
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        wrong = error.start if wrong < 0 else min(wrong, error.start)
    if wrong >= 0:
        place = "" if position is None else f" in {place_of(file, position)}"
        raise UserError(
            f"{file}: byte 0x{data[wrong]:02x} at offset {(position or 0) + wrong}{place} is not UTF-8 text; convert "
            "the file to UTF-8, or leave it out if it is binary."
        )
    return text.removeprefix("\ufeff")  # the byte order mark


def _rows(part: Part, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    batches, row = open_table(part.file), 0
    if part.file.suffix == ".parquet":
        row = sum(batches.metadata.row_group(number).num_rows for number in range(part.start))
        batches = batches.iter_batches(1024, row_groups=range(part.start, part.stop), columns=columns)
    for batch in batches:
        yield from enumerate(batch.select(columns).to_pylist(), row)
        row += batch.num_rows


def _json_lines(part: Part) -> Iterator[tuple[int, Any]]:
    """Those that begin within a part; a packed file is one part."""
    with open_lines(part.file) as stream:
        if part.start:  # a line that begins before belongs to the part before
            stream.seek(part.start - 1)
            stream.readline(MAX_DOCUMENT + 1)
        position = stream.tell()
        is_packed = part.file.suffix not in LINES
        while (is_packed or position < part.stop) and (line := stream.readline(MAX_DOCUMENT + 1)):
            if len(line) > MAX_DOCUMENT:
                place = place_of(part.file, position)
                raise UserError(f"{part.file}: {place} is longer than {MAX_DOCUMENT:,} bytes; cut it, or leave it out.")
            if line.strip():
                yield position, _json(part.file, line, position)
            position += len(line)


def _json(file: Path, line: bytes, position: int) -> Any:
    try:
        return json.loads(_decoded(file, line, position))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: {place_of(file, position)} is not JSON ({error}); fix or remove it.") from None
