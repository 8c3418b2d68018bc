"""Nothing is lost, whenever a run is killed and when its disk is full."""

import builtins
import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from engines import make, save, train, writer_for
from ranks import run_ranks, start_ranks
from toy import SHIPPED, ds_config, losses, train_here, write_inputs

from megamoe.checkpoint import folders, slice_file, verify
from megamoe.json_files import read_json
from megamoe.training.sinks import read_log

KILLS = 20
ROOT = Path(__file__).parent.parent.parent


def last_step(run_dir):
    return max((record["step"] for record in read_log(run_dir)["train"]), default=0)


def newest(checkpoints):
    """Step of the checkpoint that a run would go on from."""
    found = folders.checkpoints(checkpoints)
    return folders.step_of(found[0]) if found else 0


def incomplete(checkpoints):
    return [path for path in folders.step_folders(checkpoints) if not folders.is_complete(path)]


def wait_until(condition, ranks, pause=0.001, seconds=120):
    """Look again after so many seconds each; fails if a rank ends or time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(process.is_alive() for process in ranks), "a rank ended by itself"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(pause)


def test_twenty_kills_while_training_and_saving_cost_nothing_but_time(tmp_path):
    ds = read_json(SHIPPED / "zero2.json")  # bf16
    ds["scheduler"]["params"].update(warmup_num_steps=4, total_num_steps=10_000)
    noisy = {"expert_dropout": 0.1, "router_jitter_noise": 0.05}
    run = {**write_inputs(tmp_path, ds, noisy), "ep_size": 2, "save_interval": 2, "eval_interval": 0, "keep_last": 2}
    cut = {**run, "run_dir": str(tmp_path / "cut")}
    checkpoints = tmp_path / "cut" / "checkpoints"
    draw = random.Random(0)
    torn = 0
    for kill in range(KILLS):
        begin = last_step(tmp_path / "cut") if kill else 0
        saved = newest(checkpoints)
        ranks = start_ranks(2, train_here, {**cut, "steps": 10_000, "auto_resume": True})
        try:
            wait_until(lambda: (tmp_path / "cut" / "log.jsonl").is_file(), ranks, 0.02)
            wait_until(lambda begin=begin: last_step(tmp_path / "cut") not in (0, begin), ranks, 0.02)
            time.sleep(draw.uniform(0, 0.3))
            if kill % 2:  # in the middle of a save
                wait_until(lambda: any(incomplete(checkpoints)), ranks)
                time.sleep(draw.uniform(0, 0.01))
        finally:
            for process in draw.sample(ranks, 2):
                process.kill()
                process.join()
        torn += any(incomplete(checkpoints))
        # Every checkpoint with an index is what was saved, and a run never goes on from an older one than before.
        assert all(verify.problems(path) == [] for path in folders.checkpoints(checkpoints))
        assert newest(checkpoints) >= saved
    assert torn > KILLS // 4
    steps = last_step(tmp_path / "cut") + 3
    resumed = run_ranks(2, train_here, {**cut, "steps": steps, "resume": True})[0]
    whole = run_ranks(2, train_here, {**run, "run_dir": str(tmp_path / "whole"), "steps": steps, "save_interval": 0})[0]
    assert len(losses(whole)) == steps
    assert losses(resumed) == losses(whole)
    assert incomplete(checkpoints) == []


def run_on_a_small_disk(run, folder, kilobytes):
    """Train into a file system of so many kilobytes, in a mount namespace of its own; its run folder is copied out."""
    words = [sys.executable, str(ROOT / "megamoe" / "pretrain.py")]
    for name, value in {**run, "run_dir": str(folder / "small" / "run")}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    script = f"""
        mount -t tmpfs -o size={kilobytes}k none {folder}/small && "$@"
        code=$?
        cp -r {folder}/small/run {folder}/copy
        exit $code"""
    (folder / "small").mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode and "CI" not in os.environ:
        pytest.skip("this machine does not let its users make a mount namespace, so there is no small disk to fill")
    return subprocess.run(
        [*unshare, "sh", "-c", script, "sh", *words],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as the ranks of the tests, or sums round otherwise
    )


@pytest.mark.parametrize("foreground", [False, True])
def test_on_a_full_disk_training_goes_on_from_the_old_checkpoint_with_a_loud_line(tmp_path, foreground):
    run = write_inputs(tmp_path, ds_config(4))
    whole = run_ranks(1, train_here, {**run, "run_dir": str(tmp_path / "whole"), "steps": 12})[0]
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoints" / "step_12").iterdir())
    options = {**run, "save_interval": 3, "steps": 9}
    if foreground:
        options["foreground_save"] = []
    # Room for one checkpoint and a half, and for the log.
    done = run_on_a_small_disk(options, tmp_path, 150 + size * 3 // 2 // 1024)
    loud = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1, done.stderr  # a restart can cure it
    assert len(loud) == 2, done.stderr  # steps 6 and 9
    for step, line in zip((6, 9), loud, strict=True):
        assert f"step_{step} was NOT saved" in line
        assert "No space left on device" in line
        assert "step_3 is still the newest checkpoint" in line
    assert "Traceback" not in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("step=9 avg")]
    left = sorted(path.name for path in (tmp_path / "copy" / "checkpoints").iterdir())
    assert left == ["latest", "step_3"]
    # With room, the run goes on from there as if nothing had been.
    shutil.move(tmp_path / "copy", tmp_path / "run")
    log = run_ranks(1, train_here, {**run, "run_dir": str(tmp_path / "run"), "steps": 12, "resume": True})[0]
    assert losses(log) == losses(whole)


class Killed(BaseException):
    """Nothing in the code under test catches it."""


class KillAt:
    """Ends the thread that saves at the nth call that changes the disk: before it, or halfway through a write."""

    def __init__(self, patch, nth, half):
        self.left = nth
        self.half = half
        self.patch = patch
        for owner, name in ((folders, "flush"), (folders.os, "replace"), (Path, "mkdir"), (Path, "unlink")):
            patch.setattr(owner, name, self.counted(getattr(owner, name)))
        patch.setattr(
            slice_file, "_write", self.counted(slice_file._write, lambda file, data: file.write(data[: len(data) // 2]))
        )
        patch.setattr(
            folders,
            "write_file",
            self.counted(folders.write_file, lambda path, data: path.write_bytes(data[: len(data) // 2])),
        )
        patch.setattr(folders.shutil, "rmtree", self.counted(folders.shutil.rmtree))
        patch.setattr(builtins, "open", self.counted_open(builtins.open))

    def counted(self, real, halfway=None):
        def call(*args, **kwargs):
            if threading.current_thread() is not threading.main_thread():
                self.left -= 1
                if self.left == 0:
                    if halfway and self.half:
                        halfway(*args)
                    raise Killed
            return real(*args, **kwargs)

        return call

    def counted_open(self, real):
        counted = self.counted(real)
        return lambda path, mode="r", *args, **kwargs: (counted if "x" in mode else real)(path, mode, *args, **kwargs)


def kill_saves_everywhere(folder, killed_rank, half):
    """For each n, a save of step 2 during which one rank is killed at its nth call; returns what was left, by n."""
    engine = make(2)
    train(engine, 1)
    save(engine, folder / "first", 1)
    train(engine, 1, 1)
    left = []
    threading.excepthook = lambda args: None  # of Killed
    for nth in itertools.count(1):
        checkpoints = folder / f"{killed_rank}_{nth}" / "checkpoints"
        if dist.get_rank() == 0:
            shutil.copytree(folder / "first", checkpoints)
        dist.barrier()
        writer = writer_for(engine, checkpoints, keep_last=1, resumed=checkpoints / "step_1")
        with pytest.MonkeyPatch.context() as patch:
            kill = KillAt(patch, nth, half) if dist.get_rank() == killed_rank else None
            writer.save(2, hold=True)
            if kill:
                writer._thread.join()
            dist.barrier()  # the other rank's thread waits for ever, as the job's end would end it
        was_killed = [kill.left <= 0 if kill else None]
        dist.broadcast_object_list(was_killed, src=killed_rank)
        found = folders.checkpoints(checkpoints)
        left.append(([path.name for path in found], [verify.problems(path) for path in found]))
        if not was_killed[0]:
            writer.complete()
            return left
    return None


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("killed_rank", [0, 1])
def test_a_kill_at_any_call_of_a_save_leaves_the_older_checkpoint_or_the_new_one(tmp_path, killed_rank, half):
    left, _ = run_ranks(2, kill_saves_everywhere, tmp_path, killed_rank, half)
    assert len(left) > (10 if killed_rank == 0 else 3)
    for names, problems in left:
        assert names in (["step_1"], ["step_2"], ["step_2", "step_1"])
        assert not any(problems), problems
    assert left[-1][0] == ["step_2"]
