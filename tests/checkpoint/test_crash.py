"""Nothing is lost, whenever a run is killed."""

import builtins
import itertools
import os
import shutil
import signal
import threading
from pathlib import Path

import engines
import torch.distributed as dist
from engines import make, save, train, writer_for
from ranks import run_ranks

from megamoe.checkpoint import folders, verify
from megamoe.launch.exchange import open_store
from megamoe.utils import disk

DEADLINE = 240  # seconds, which end a hang


def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt:
    """Kills this process at the nth call of the thread that saves which changes the disk, before it; or halfway through
    the nth write or removal."""

    def __init__(self, nth, half):
        self.left = nth
        self.half = half
        for owner, name in ((disk, "flush"), (disk.os, "replace"), (Path, "mkdir"), (Path, "unlink")):
            setattr(owner, name, self.counted(getattr(owner, name)))
        disk.write_file = self.counted(disk.write_file, lambda path, data: path.write_bytes(data[: len(data) // 2]))
        folders.shutil.rmtree = self.counted(folders.shutil.rmtree, remove_a_file)
        builtins.open = self.counted_open(builtins.open)

    def counted(self, real, halfway=None):
        def call(*args, **kwargs):
            counts = halfway or not self.half
            if counts and threading.current_thread() is not threading.main_thread():
                self.left -= 1
                if self.left == 0:
                    if self.half:
                        halfway(*args)
                    kill()
            return real(*args, **kwargs)

        return call

    def counted_open(self, real):
        counted = self.counted(real)
        return lambda path, mode="r", *args, **kwargs: (counted if "x" in mode else real)(path, mode, *args, **kwargs)


def remove_a_file(folder):
    os.unlink(min(folder.glob("rank_*")))


def save_and_exit(engine, checkpoints, store, kill_at):
    """In a child of a rank: save step 2."""
    engines.new_store = lambda purpose: store
    writer = writer_for(engine, checkpoints, keep_last=1, resumed=checkpoints / "step_1")
    if kill_at:
        KillAt(*kill_at)
    writer.save(2, hold=True)
    os._exit(not writer.complete())


def was_killed_at(nth, half, killed_rank, engine, checkpoints):
    """Whether a child of that rank came to its nth call. The other rank's child, which then waits for it, ends too."""
    # Before the fork: a thread of gloo may hold the resolver's lock, which a child could then never get.
    store = open_store("127.0.0.1", int(os.environ["MASTER_PORT"]), False, DEADLINE)
    child = os.fork()
    if child == 0:
        try:
            own = dist.PrefixStore(checkpoints.parent.name, store)
            save_and_exit(engine, checkpoints, own, (nth, half) if dist.get_rank() == killed_rank else None)
        finally:
            os._exit(9)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if dist.get_rank() == killed_rank else None
    codes = [code]
    dist.broadcast_object_list(codes, src=killed_rank)
    if code is None:
        if codes[0]:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert codes[0] in (0, -signal.SIGKILL)
    return codes[0] != 0


def kill_saves_everywhere(folder):
    """Saves of step 2, during each of which one rank is killed at another call; returns what was left of each."""
    engine = make(2)
    train(engine, 1)
    save(engine, folder / "first", 1)
    train(engine, 1, 1)
    left = {}
    for killed_rank, half in ((0, False), (0, True), (1, False)):
        for nth in itertools.count(1):
            checkpoints = folder / f"{killed_rank}_{half}_{nth}" / "checkpoints"
            if dist.get_rank() == 0:
                shutil.copytree(folder / "first", checkpoints)
            dist.barrier()
            was_killed = was_killed_at(nth, half, killed_rank, engine, checkpoints)
            if dist.get_rank() == 0:
                found = folders.checkpoints(checkpoints)
                names, problems = [path.name for path in found], [verify.problems(path) for path in found]
                left.setdefault((killed_rank, half), []).append((names, problems))
            if not was_killed:
                break
    return left


def test_a_kill_at_any_call_of_a_save_leaves_the_older_checkpoint_or_the_new_one(tmp_path):
    left, _ = run_ranks(2, kill_saves_everywhere, tmp_path)
    least = {(0, False): 16, (0, True): 3, (1, False): 3}
    assert all(len(left[case]) >= count for case, count in least.items()), {key: len(left[key]) for key in left}
    for saves in left.values():
        for names, problems in saves:
            assert names in (["step_1"], ["step_2"], ["step_2", "step_1"])
            assert not any(problems), problems
        assert saves[-1][0] == ["step_2"]
