"""Numbers as text."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
