"""The one reader of JSON files. What it returns is safe to check: every key of an object once, finite numbers, no deep
nesting."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

from megamoe.utils.errors import UserError, shown

MAX_BYTES = 64 << 20
MAX_DEPTH = 64  # tokenizers nest most, and stay below 20


def check_regular(path: Path, wanted: str) -> int:
    """Size in bytes of the regular file at `path`. Raises UserError, which asks for `wanted`, where there is none: a
    device or a pipe may block or never end."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of {wanted}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: is a folder, a device or a pipe, not a regular file; give the path of {wanted}.")
    return status.st_size


def read_regular(path: Path, wanted: str) -> bytes:
    """The bytes of a regular file of at most MAX_BYTES. Raises UserError."""
    size = check_regular(path, wanted)
    if size > MAX_BYTES:
        raise UserError(f"{path}: has {size:,} bytes, above the limit of {MAX_BYTES:,}; give {wanted}.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of {wanted}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError for a missing file, bad syntax, a key given twice with different values, and
    for what this module keeps out."""
    return parse_json(read_regular(path, "a JSON file"), path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object over several lines."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def parse_json(data: bytes, path: Path | str) -> dict[str, Any]:
    """The JSON object in `data`, which comes from `path`. Raises UserError as `read_json`."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_finite,
        )
        _check_within(value, 0)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except UserError as error:
        raise UserError(*(f"{path}: {problem}" for problem in error.problems)) from None
    except RecursionError:
        raise UserError(f"{path}: {_TOO_DEEP}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); fix the syntax there.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__} where a JSON object of settings is needed.")
    return value


_TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels; give a file that is not."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for key, value in pairs:
        if key in given and given[key] != value:
            raise UserError(f"{shown(key)} is given twice, as {shown(given[key])} and as {shown(value)}; keep one.")
        given[key] = value
    return given


def _finite(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise UserError(f"the number {digits[:20]} is not finite; give a number.")
    return float(digits)


def _check_within(value: Any, depth: int) -> None:
    """Raises UserError for nesting below MAX_DEPTH."""
    if depth > MAX_DEPTH:
        raise UserError(_TOO_DEEP)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        _check_within(one, depth + 1)
