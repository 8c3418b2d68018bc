"""Opens packed JSON lines, and parquet and Arrow files (what `datasets` saves) by pyarrow, an extra."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
