"""Rows of parquet and Arrow files (what `datasets` saves), read by pyarrow, an extra."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megamoe.utils.errors import UserError, first_line

TABLE_SUFFIXES = (".parquet", ".arrow")


def column_names(file: Path) -> list[str]:
    """Raises UserError."""
    schema = "schema" if file.suffix == ".arrow" else "schema_arrow"
    return _guarded(file, lambda: getattr(_open(file), schema).names)


def parquet_groups(file: Path) -> list[int]:
    """Bytes of each row group of a parquet file, unpacked. Raises UserError."""
    metadata = _guarded(file, lambda: _open(file).metadata)
    return [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]


def read_rows(file: Path, start: int, stop: int, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number in the file, row) of each row of a range: row groups of parquet, batches that begin at these bytes of an
    Arrow file. Raises UserError."""
    is_arrow = file.suffix == ".arrow"
    batches = _arrow_batches(file, start, stop) if is_arrow else _parquet_batches(file, start, stop, columns)
    while found := _guarded(file, lambda: next(batches, None)):
        first, batch = found
        yield from enumerate(_guarded(file, batch.select(columns).to_pylist), first)


def _parquet_batches(file: Path, start: int, stop: int, columns: list[str]) -> Iterator[tuple[int, Any]]:
    table = _open(file)
    row = sum(table.metadata.row_group(number).num_rows for number in range(start))
    for batch in table.iter_batches(1024, row_groups=range(start, stop), columns=columns):
        yield row, batch
        row += batch.num_rows


def _arrow_batches(file: Path, start: int, stop: int) -> Iterator[tuple[int, Any]]:
    with _pyarrow(file).memory_map(str(file)) as source:
        row, reader = 0, _pyarrow(file).ipc.open_stream(source)
        while (place := source.tell()) < stop:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                return
            if place >= start:
                yield row, batch
            row += batch.num_rows


def _open(file: Path) -> Any:
    if file.suffix == ".arrow":
        return _pyarrow(file).ipc.open_stream(_pyarrow(file).memory_map(str(file)))
    return _pyarrow(file).parquet.ParquetFile(file)


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: needs pyarrow, which is not installed; pip install 'megamoe[parquet]'.") from None
    return pyarrow


def _guarded(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (OSError, ValueError, EOFError) as error:  # pyarrow's own are among these
        raise UserError(f"{file}: cannot be read ({first_line(error)}); replace the file.") from None
