"""Documents from text, JSON lines (plain, .gz, .zst), parquet and Arrow files."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from megamoe.data.inputs import MAX_DOCUMENT, Part, is_text, parts_of
from megamoe.data.tables import TABLE_SUFFIXES, read_rows
from megamoe.utils.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Keep = Callable[[dict[str, Any]], bool]
CHUNK = 1 << 24


def read_documents(files: Iterable[Path], text_key: str) -> Iterator[str]:
    """The non-empty documents in `files`, as `read_part`."""
    for part in (part for file in files for part in parts_of(file, [text_key])):
        yield from (text for text in read_part(part, [text_key], lambda _: True) if text and text.strip())


def read_part(part: Part, columns: list[str], keep: Keep) -> Iterator[str | None]:
    """The documents of a part: a text file is one, a line of JSON lines, a row of a table; None for one whose record
    `keep` refuses.

    Args:
        columns: to read of tables; the first holds the text.

    Raises UserError, naming file and place, for what is truncated, undecodable or too long, or has no text.
    """
    try:
        if is_text(part.file):
            yield _text(part.file)
            return
        is_table = part.file.suffix in TABLE_SUFFIXES
        for position, record in read_rows(*part[:3], columns) if is_table else _json_lines(part):
            yield _text_of(record, columns[0], keep, part.file, position)
    except (OSError, EOFError, zlib.error, zstd.ZstdError) as error:
        raise UserError(f"{part.file}: cannot be read ({error}); replace the file.") from None


def _text_of(record: Any, key: str, keep: Keep, file: Path, position: int) -> str | None:
    """Text of a record, or None where `keep` refuses it."""
    try:
        if isinstance(record, dict) and not keep(record):
            return None
        text = record.get(key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f'has no text under "{key}"; name the key with --text_key, or leave it out with --where "{key}!=null"'
            )
        if not text.isascii():
            text.encode()
        if len(text) > MAX_DOCUMENT:
            raise ValueError(f"is longer than {MAX_DOCUMENT:,} characters; cut it, or leave it out")
        return text
    except UnicodeEncodeError:
        problem = "holds half of a surrogate pair, which is no character; remove it"
    except ValueError as error:
        problem = str(error)
    raise UserError(f"{file}: {_place(file, position)} {problem}.")


def _text(file: Path) -> str:
    data = file.read_bytes()
    if b"\0" in data:  # valid UTF-8, but a binary file holds it nearly always, and a text never
        raise UserError(_not_text(file, 0, data.index(0)))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(_not_text(file, data[error.start], error.start)) from None


def _not_text(file: Path, byte: int, offset: int, place: str = "") -> str:
    place = f"byte 0x{byte:02x} at offset {offset}{place}"
    return f"{file}: {place} is not UTF-8 text; convert the file to UTF-8, or leave it out if it is binary."


def _json_lines(part: Part) -> Iterator[tuple[int, Any]]:
    """(place of the line in the unpacked file, its value) of the lines that begin within a part."""
    with open(part.file, "rb") as raw:
        stream = _unpacked(raw, part.file.suffix)
        if part.start:  # a line that begins before belongs to the part before
            stream.seek(part.start - 1)
            stream.readline()
        position = stream.tell()
        while (stream is not raw or position < part.stop) and (line := stream.readline(MAX_DOCUMENT + 1)):
            if len(line) > MAX_DOCUMENT:
                place = _place(part.file, position)
                raise UserError(f"{part.file}: {place} is longer than {MAX_DOCUMENT:,} bytes; cut it, or leave it out.")
            if line.strip():
                yield position, _json(part.file, line, position)
            position += len(line)


def _json(file: Path, line: bytes, position: int) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        place = f" in {_place(file, position)}"
        raise UserError(_not_text(file, line[error.start], position + error.start, place)) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: {_place(file, position)} is not JSON ({error}); fix or remove it.") from None


def _unpacked(raw: IO[bytes], suffix: str) -> Any:
    return gzip.GzipFile(fileobj=raw) if suffix == ".gz" else zstd.ZstdFile(raw) if suffix == ".zst" else raw


def _place(file: Path, position: int) -> str:
    """Says where a record lies: its row in a table, its line and byte in JSON lines, which are counted only then."""
    if file.suffix in TABLE_SUFFIXES:
        return f"row {position + 1}"
    number, left = 1, position
    with open(file, "rb") as raw:
        stream = _unpacked(raw, file.suffix)
        while left and (chunk := stream.read(min(left, CHUNK))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return f"line {number} (byte {position:,})"
