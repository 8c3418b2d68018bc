"""A dry run trains the step that the run would, and leaves nothing."""

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from ranks import DEADLINE, run_ranks
from toy import check_here, new_store, train_here

from megamoe import dry_run
from megamoe.launch.stopping import StopRequest
from megamoe.launch.watch import Position
from megamoe.pretrain import run_dry
from megamoe.utils import run_folder

ROOT = Path(dry_run.__file__).parents[1]


def files(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def dry_here(run):
    """A dry run, on this rank of a group that exists already; returns whether it came to its end, what it has printed,
    and which folders it has locked."""
    said, lock = io.StringIO(), mock.Mock(side_effect=run_folder._lock)
    with contextlib.redirect_stdout(said), mock.patch.object(run_folder, "_lock", lock):
        done = run_dry(check_here({**run, "dry_run": True}), new_store("run"), Position(), StopRequest())
    dist.barrier()
    return done, said.getvalue(), [call.args[0].name for call in lock.call_args_list]


def test_a_new_run_says_how_large_it_is_and_leaves_nothing(inputs, tmp_path):
    before = files(tmp_path)
    (done, said, _), (also_done, *_) = run_ranks(2, dry_here, inputs)
    assert done
    assert also_done
    assert files(tmp_path) == before
    assert "600 held-out tokens in" in said  # as of the run, though none is evaluated
    times = r"dry run: built in [\d.]+ s, first step in [\d.]+ s, saved in [\d.]+ s\n"
    memory = r"memory: \d+\.\d+ GiB at the peak of the rank with most, of [\d.]+ GiB of its host\n"
    disk = r"disk: 0\.00\d GB per checkpoint, [\d.]+ GB free, enough for [\d,]+\n"
    assert re.search(times + memory + disk + "the run would train steps 1 to 40; nothing was kept\n$", said)


def test_next_to_a_run_that_trains_it_takes_the_step_after_its_checkpoint_and_touches_nothing(inputs, tmp_path):
    run_ranks(2, train_here, {**inputs, "steps": 2})
    before = files(tmp_path)
    (done, said, locked), _ = run_ranks(2, dry_here, {**inputs, "resume": True})
    assert done
    assert all(name.startswith(".dry-run-") for name in locked)
    assert files(tmp_path) == before
    *lines, end = said.splitlines()
    assert end == "the run would train steps 3 to 40; nothing was kept"
    assert [line.split()[0] for line in lines if line.startswith("step=")] == ["step=3"]  # no evaluation


@pytest.mark.parametrize("end", ["error", "exit", "kill"])
def test_the_folder_goes_however_the_process_ends(tmp_path, end):
    program = f"""if True:
        import os, signal
        import torch.distributed as dist
        from pathlib import Path
        from megamoe.dry_run import temporary_folder
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        with temporary_folder(Path("runs/mine")) as folder:
            (folder / "file").write_text("of a checkpoint")
            print(folder, flush=True)
            if {end!r} == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if {end!r} == "exit":
                os._exit(1)
            raise KeyboardInterrupt
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert done.stdout, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.parent == tmp_path
    until = time.monotonic() + DEADLINE
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []
