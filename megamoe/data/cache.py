"""What was read of object stores, on local disk: bounded, shared by the ranks of a host, kept for later runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from megamoe.utils.errors import UserError

TRIES = 4  # reads of what has a wrong hash
LOCKS = 1024  # by hash of the path
KEPT, LOOKS = 0.75, 64  # share of the limit that a look at the size leaves; looks while the whole limit is written


class Cache:
    """Files that are complete or absent, and are checked whenever they are read."""

    def __init__(self, parent: str | None, limit: int):
        """
        Args:
            parent: of the cache's folder; by default that of the user's caches.
            limit: bytes.
        """
        parent = parent or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.folder = Path(parent).expanduser() / "megamoe_corpora"  # its own: any file in it may be removed
        self._limit = limit
        self._locks = [Lock() for _ in range(LOCKS)]
        self._written = limit  # since the last look at the size; earlier runs may have filled it

    def get(self, path: Path, origin: str, read: Callable[[], bytes], is_right: Callable[[bytes], bool]) -> bytes:
        """The content of a file, fetched where it is absent. Raises what reading its origin raises, and UserError where
        the content is never right.

        Args:
            origin: for messages; `read` gives the content from there.
        """
        for _ in range(TRIES):
            with self._locks[hash(path) % LOCKS]:  # threads that need the same file
                try:
                    data = path.read_bytes()
                    os.utime(path)
                except FileNotFoundError:
                    data = read()
                    self._write(path, data)
            if is_right(data):
                return data
            path.unlink(missing_ok=True)
        raise UserError(f"{origin} has another hash than corpus.json gives, in {TRIES} reads; upload the folder again.")

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(data)
            os.replace(file.name, path)
        except OSError as error:
            why = error.strerror
            raise UserError(f"{self.folder} cannot be written ({why}); choose another --cache_dir.") from None
        self._written += len(data)
        if self._written > self._limit / LOOKS:
            self._written = 0
            self._remove_oldest()

    def _remove_oldest(self) -> None:
        """Remove the least recently used files. Other processes may do so at the same time."""
        files = []
        for path in self.folder.glob("**/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            files += [(status.st_mtime_ns, status.st_size, path)] * path.is_file()
        excess = sum(size for _, size, _ in files) - self._limit * KEPT
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
