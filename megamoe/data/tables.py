"""Parquet and Arrow files (of which `datasets` makes its folders), read by pyarrow, an extra."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamoe.utils.errors import UserError, first_line

TABLE_SUFFIXES = (".parquet", ".arrow")
ROWS = 1024  # of parquet, read at a time


def read_schema(file: Path) -> list[str]:
    """Names of the columns. Raises UserError."""
    return _guarded(
        file, lambda: _open(file).schema.names if file.suffix == ".arrow" else _open(file).schema_arrow.names
    )


def parquet_groups(file: Path) -> list[int]:
    """Bytes of each row group of a parquet file, unpacked. Raises UserError."""
    metadata = _guarded(file, lambda: _open(file).metadata)
    return [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]


def read_rows(file: Path, start: int, stop: int, columns: list[str]) -> Iterator[tuple[int, dict[str, Any], float]]:
    """(number of the row in the file, the row, share of the range that is read) of each row of a range: row groups of
    parquet, batches that begin at these bytes of an Arrow file. Raises UserError."""
    batches = (
        _arrow_batches(file, start, stop) if file.suffix == ".arrow" else _parquet_batches(file, start, stop, columns)
    )
    while batch := _guarded(file, lambda: next(batches, None)):
        first, rows, share = batch
        records = _guarded(file, rows.select(columns).to_pylist)
        for number, record in enumerate(records, first):
            yield number, record, share


def _parquet_batches(file: Path, start: int, stop: int, columns: list[str]) -> Iterator[tuple[int, Any, float]]:
    table = _open(file)
    rows = [table.metadata.row_group(number).num_rows for number in range(stop)]
    first = sum(rows[:start])
    for batch in table.iter_batches(ROWS, row_groups=range(start, stop), columns=columns):
        yield first, batch, (first + batch.num_rows - sum(rows[:start])) / sum(rows[start:])
        first += batch.num_rows


def _arrow_batches(file: Path, start: int, stop: int) -> Iterator[tuple[int, Any, float]]:
    import pyarrow

    row = 0
    with pyarrow.memory_map(str(file)) as source:
        reader = pyarrow.ipc.open_stream(source)
        while (place := source.tell()) < stop:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                return
            if place >= start:
                yield row, batch, (source.tell() - start) / (stop - start)
            row += batch.num_rows


def _open(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file}: is read by pyarrow, which is not installed: pip install 'megamoe[parquet]'."
        ) from None
    if file.suffix == ".arrow":
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
    return pyarrow.parquet.ParquetFile(file)


def _guarded(file: Path, read: Any) -> Any:
    try:
        return read()
    except (OSError, ValueError, EOFError) as error:  # pyarrow's own are among these
        raise UserError(f"{file}: cannot be read ({first_line(error)}); replace the file.") from None
