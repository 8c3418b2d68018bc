"""Numbers as text."""

from __future__ import annotations

UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


def size(count: float) -> str:
    """Bytes of memory with their unit."""
    unit = next((unit for unit in UNITS if count >= UNITS[unit]), "B")
    return f"{count / UNITS[unit]:.4g} {unit}"
