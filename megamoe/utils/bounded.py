"""Waits that end, for what may never answer: a file server, a device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any


def within(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`; None where it fails or takes longer, and then goes on in its own thread."""
    results = []

    def call() -> None:
        with contextlib.suppress(Exception):
            results.append(function(*args))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
