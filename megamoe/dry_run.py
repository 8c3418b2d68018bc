"""A dry run, `megamoe train --dry_run`: the run is built and restored, trains one step and saves it aside, and leaves
nothing."""

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


class Measured(ConsoleSink):
    """The console of a run of one step, and what that has taken. On rank 0."""

    def open(self, run_dir: Path, first_step: int, record: dict[str, Any]) -> None:
        self.built = time.time()
        self.steps = f"{first_step + 1:,} to {record['last_step']:,}"

    def log_event(self, event: str, step: int, values: dict[str, Any]) -> None:
        if event == "first_step":
            self.step_seconds = time.time() - self.built
        elif event == "save":
            self.saved = values


def dry_run(run_folder: Path, device: torch.device, train: Callable[[Path, Measured], bool]) -> bool:
    """Returns whether it came to its end, and was not asked to stop before. Collective.

    Args:
        train: one step of the run in a folder.
    """
    measured = Measured()
    with temporary_folder(run_folder) as folder:
        if not train(folder, measured):
            return False
        peaks = [0.0] * dist.get_world_size()
        dist.all_gather_object(peaks, memory_gib(device))
        if dist.get_rank() == 0:
            on_gpu, saved = device.type == "cuda", measured.saved
            of = torch.cuda.get_device_properties(device).total_memory if on_gpu else memory_limits()[0]
            free = shutil.disk_usage(folder).free + saved["bytes"]
            print(
                f"dry run: built in {measured.built - psutil.Process().create_time():.1f} s, first step in "
                f"{measured.step_seconds:.1f} s, saved in {saved['seconds']:.1f} s\n"
                f"memory: {max(peaks):.2f} GiB at the peak of the rank with most, of {of / 2**30:.1f} GiB "
                f"{'per GPU' if on_gpu else 'of its host'}\n"
                f"disk: {saved['bytes'] / 1e9:.3f} GB per checkpoint, {free / 1e9:.1f} GB free, enough for "
                f"{free // saved['bytes']:,}\nthe run would train steps {measured.steps}; nothing was kept",
                flush=True,
            )
    return True


@contextlib.contextmanager
def temporary_folder(run_folder: Path) -> Iterator[Path]:
    """A hidden folder on the file system of a run folder, the same on all ranks, removed however rank 0 ends.
    Collective."""
    made = [""]
    if dist.get_rank() == 0:
        made = [tempfile.mkdtemp(prefix=".dry-run-", dir=existing_folder(run_folder.absolute()))]
        words = ["sh", "-c", 'cat; rm -rf "$0"', made[0]]  # reads until this process has ended, be it killed
        remover = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
    try:
        dist.broadcast_object_list(made)
        yield Path(made[0])
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(made[0], ignore_errors=True)
            remover.communicate()
