"""Time saving and loading a checkpoint against a bare torch.save of the same bytes, interleaved in one run.

    python tools/dev/benchmark_checkpoint.py --out /scratch/bench                      one rank
    launch: deepspeed --num_gpus 8 tools/dev/benchmark_checkpoint.py --ep_size 8 ...   as a job of that size would

Prints a line per round and the medians with their ratios, and peak memory. The bare save ends with an fsync, as
megamoe's own does; before a load, the files are dropped from the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamoe.checkpoint import folders
from megamoe.checkpoint.restore import restore_first_verified
from megamoe.checkpoint.writer import CheckpointWriter
from megamoe.config import cli
from megamoe.config.model import load_preset
from megamoe.config.precision import find_precision
from megamoe.config.recipe import read_recipe
from megamoe.data.batches import Batch
from megamoe.launch.distributed import init_distributed
from megamoe.training.step import build_train_step
from megamoe.utils.errors import UserError
from megamoe.utils.hardware import memory_gib


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in inner for tensor in tensors_in(one)]


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(function: Callable[..., Any], *args: Any) -> float:
    """Seconds until the slowest rank is through."""
    dist.barrier()
    start = time.perf_counter()
    function(*args)
    dist.barrier()
    return time.perf_counter() - start


class Bench:
    """An engine with optimizer state, and what is done to it."""

    def __init__(self, preset: str, ds_config: str, ep_size: int, folder: Path, tokens: int):
        rendezvous, device = init_distributed()
        rank, world_size = rendezvous.rank_info.rank, rendezvous.rank_info.world_size
        config = load_preset(preset)
        recipe = read_recipe(ds_config, world_size, device.type == "cpu", find_precision(device).choice)
        self.folder, self.store = folder, rendezvous.store
        self.bare_file = folder / f"bare_{rank}.pt"
        self.train_step = build_train_step(config, recipe.replaced({"gradient_accumulation_steps": 1}), ep_size=ep_size)
        self.engine = self.train_step.engine
        ids = torch.randint(config.vocab_size, (1, tokens), device=device)
        self.batch = Batch(ids, ids)
        self.forward_backward()
        self.train_step.update()
        if rank == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        self.record = {"world_size": world_size, "ep_size": ep_size}

    def forward_backward(self) -> None:
        self.train_step.forward_backward([self.batch])

    def bare_state(self) -> list[torch.Tensor]:
        """The engine's own tensors; at one rank as many bytes as a checkpoint holds."""
        return tensors_in([self.engine.optimizer.state_dict(), self.engine.module.state_dict()])

    def bare_save(self) -> None:
        with open(self.bare_file, "wb") as file:
            torch.save(self.bare_state(), file)
            file.flush()
            os.fsync(file.fileno())

    def bare_load(self) -> None:
        with torch.no_grad():
            saved = torch.load(self.bare_file, mmap=True, weights_only=True)
            for tensor, other in zip(self.bare_state(), saved, strict=True):
                tensor.copy_(other)

    def writer(self) -> CheckpointWriter:
        resumed = next(iter(folders.checkpoints(self.folder / "checkpoints")), None)
        return CheckpointWriter(
            self.engine, self.folder / "checkpoints", self.record, store=self.store, keep_last=1, resumed=resumed
        )

    def save(self, writer: CheckpointWriter, step: int) -> None:
        writer.save(step, hold=True)
        assert writer.complete()

    def background_save(self, writer: CheckpointWriter, step: int) -> float:
        """Save alongside training steps; returns the seconds that training lost by it, the slower step included."""
        alone = timed(self.forward_backward) + timed(self.train_step.update)
        lost = timed(writer.save, step) + timed(self.forward_backward) + timed(writer.before_update)
        lost += timed(self.train_step.update) - alone
        while writer.writing:
            time.sleep(0.01)
        return lost + timed(writer.complete)

    def load(self) -> None:
        assert restore_first_verified(self.engine, folders.checkpoints(self.folder / "checkpoints"))

    def both_saves(self, writer: CheckpointWriter, step: int, bare_first: bool) -> dict[str, float]:
        """In turns, for a disk can take the first gigabytes faster than those that follow."""
        seconds = {"bare save": timed(self.bare_save)} if bare_first else {}
        seconds["save"] = timed(self.save, writer, step)
        return seconds if bare_first else {"bare save": timed(self.bare_save), **seconds}

    def round(self, step: int, background: bool) -> dict[str, float]:
        """Seconds of everything, once."""
        writer = self.writer()
        seconds = self.both_saves(writer, 3 * step, bare_first=step % 2 == 1)
        if background:
            for number, which in enumerate(("first", "later"), start=1):  # the first takes new memory for the copy
                start = time.perf_counter()
                seconds[f"lost to the {which} background save"] = self.background_save(writer, 3 * step + number)
                seconds[f"the {which} background save"] = time.perf_counter() - start
        del writer  # and its copy of the state
        drop_from_cache(self.folder)
        seconds["bare load"] = timed(self.bare_load)
        drop_from_cache(self.folder)
        seconds["load"] = timed(self.load)
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Time checkpoints against a bare torch.save of the same bytes.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; is made and removed again")
    parser.add_argument("--preset", default="moe-680m", help="model to save")
    parser.add_argument("--ds_config", default="ds_configs/zero2.json", help="DeepSpeed JSON")
    parser.add_argument("--ep_size", type=int, default=1, help="ranks that share one set of experts")
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is measured")
    parser.add_argument("--background", action="store_true", help="measure saves alongside training steps as well")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a training step")
    parser.add_argument("--local_rank", help="given by the launcher; not used")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists already; give a folder that can be made and removed.")
    bench = Bench(args.preset, args.ds_config, args.ep_size, args.out, args.tokens)
    bench.round(0, args.background)  # not counted: a disk can be slow where it is written for the first time
    rounds = []
    for step in range(1, args.rounds + 1):
        rounds.append(bench.round(step, args.background))
        if dist.get_rank() == 0:
            print(" ".join(f"{name}={seconds:.2f}s" for name, seconds in rounds[-1].items()), flush=True)
    if dist.get_rank() == 0:
        print_medians(rounds)
        print(f"peak memory of rank 0: {memory_gib(bench.engine.device):.2f} GiB")
        shutil.rmtree(args.out)
    dist.barrier()
    dist.destroy_process_group()


def print_medians(rounds: list[dict[str, float]]) -> None:
    bare = {name: f"bare {name.split()[-1]}" for name in rounds[0]}
    for name in rounds[0]:
        seconds = statistics.median(one[name] for one in rounds)
        ratio = statistics.median(one[name] / one[bare[name]] for one in rounds)
        print(f"{name:36s} {seconds:8.2f} s   {ratio:5.2f} x {bare[name]}")


if __name__ == "__main__":
    cli.run(main)
