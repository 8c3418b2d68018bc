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
    """(number in the file, row) of each row: of an Arrow file, or of some row groups of parquet. Raises UserError."""
    table, row = _guarded(file, lambda: _open(file)), 0
    if file.suffix == ".parquet":
        row = sum(table.metadata.row_group(number).num_rows for number in range(start))
        table = table.iter_batches(1024, row_groups=range(start, stop), columns=columns)
    while (batch := _guarded(file, lambda: next(table, None))) is not None:
        yield from enumerate(_guarded(file, batch.select(columns).to_pylist), row)
        row += batch.num_rows


def _open(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: needs pyarrow, which is not installed; pip install 'megamoe[parquet]'.") from None
    if file.suffix == ".arrow":
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
    return pyarrow.parquet.ParquetFile(file)


def _guarded(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (OSError, ValueError, EOFError) as error:  # pyarrow's own are among these
        raise UserError(f"{file}: cannot be read ({first_line(error)}); replace the file.") from None
