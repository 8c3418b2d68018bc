"""A dry run, `megamoe train --dry_run`: the run is built and restored, trains one step and saves it aside; says how
long each took and how large it is; and leaves nothing."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megamoe.monitoring.console import ConsoleSink
from megamoe.utils.disk import existing_folder
from megamoe.utils.hardware import memory_gib
from megamoe.utils.host_memory import memory_limits

GIB = 2**30


class Measured(ConsoleSink):
    """What a run that takes one step tells on the console, and what it has taken. On rank 0."""

    def open(self, run_dir: Path, first_step: int, record: dict[str, Any]) -> None:
        self._built = time.time()
        self._first, self._last = first_step + 1, record["last_step"]
        self._started = psutil.Process().create_time()

    def log_event(self, event: str, step: int, values: dict[str, Any]) -> None:
        if event == "first_step":
            self._stepped = time.time()
        if event == "save":
            self._saved = values

    def describe(self, folder: Path, memory: float, device: torch.device) -> str:
        """In a few lines.

        Args:
            folder: where the checkpoint still lies.
            memory: GiB at the peak of the rank with most.
        """
        size, free = self._saved["bytes"], shutil.disk_usage(folder).free + self._saved["bytes"]
        if device.type == "cuda":
            of = f"{torch.cuda.get_device_properties(device).total_memory / GIB:.1f} GiB of its GPU"
        else:
            of = f"{memory_limits()[0] / GIB:.1f} GiB that the ranks of a host share"
        return (
            f"dry run: started and built in {self._built - self._started:.1f} s, first step in "
            f"{self._stepped - self._built:.1f} s, checkpoint saved in {self._saved['seconds']:.1f} s\n"
            f"memory: {memory:.2f} GiB at the peak of the rank with most, of {of}\n"
            f"disk: {size / 1e9:.3f} GB per checkpoint, {free / 1e9:.1f} GB free, enough for {free // size:,}\n"
            f"the run would train steps {self._first:,} to {self._last:,}; nothing of it was kept"
        )


def dry_run(run_folder: Path, device: torch.device, train: Callable[[Path, Measured], bool]) -> bool:
    """Returns whether it came to its end, and was not asked to stop before. Collective.

    Args:
        train: runs for one step in a folder.
    """
    measured = Measured()
    with temporary_folder(run_folder) as folder:
        if not train(folder, measured):
            return False
        peaks = [0.0] * dist.get_world_size()
        dist.all_gather_object(peaks, memory_gib(device))
        if dist.get_rank() == 0:
            print(measured.describe(folder, max(peaks), device), flush=True)
    return True


@contextlib.contextmanager
def temporary_folder(run_folder: Path) -> Iterator[Path]:
    """A hidden folder on the file system of a run folder, the same on all ranks, which is removed however rank 0 ends.
    Collective."""
    made: list[str] = [""]
    if dist.get_rank() == 0:
        made = [tempfile.mkdtemp(prefix=".dry-run-", dir=existing_folder(run_folder.absolute()))]
        # Reads until this process has ended, be it killed.
        remover = subprocess.Popen(
            ["sh", "-c", 'cat; rm -rf "$0"', made[0]], stdin=subprocess.PIPE, start_new_session=True
        )
    try:
        dist.broadcast_object_list(made)
        yield Path(made[0])
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(made[0], ignore_errors=True)
            assert remover.stdin
            remover.stdin.close()
            remover.wait()
