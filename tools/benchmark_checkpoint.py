"""Time saving and loading a checkpoint against a bare torch.save of the same bytes, interleaved in one run.

    python tools/benchmark_checkpoint.py --out /scratch/bench                      one rank
    launch: deepspeed --num_gpus 8 tools/benchmark_checkpoint.py --ep_size 8 ...   as a job of that size would

Prints a line per round and the medians with their ratios, and peak memory. The bare save ends with an fsync, as
megamoe's own does; before a load, the files are dropped from the page cache.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamoe import cli
from megamoe.checkpoint import CheckpointWriter, first_that_holds, restore
from megamoe.config import UserError, load_preset, read_json
from megamoe.ds_config import read_schedule
from megamoe.engine import build_engine, init_distributed
from megamoe.metrics import memory_gib
from megamoe.model import Decoder
from megamoe.reader import open_source

TOKENS = 64  # of the one training step that makes Adam's moments


def bare_state(engine: Any) -> list[torch.Tensor]:
    """The engine's own large tensors: as many bytes as a checkpoint holds, and nothing to collect."""
    zero = engine.optimizer
    moments = [t for state in zero.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return [*zero.single_partition_of_fp32_groups, *moments, *zero.parallel_partitioned_bit16_groups_flat]


def bare_save(tensors: list[torch.Tensor], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def bare_load(tensors: list[torch.Tensor], path: Path) -> None:
    with torch.no_grad():
        for tensor, saved in zip(tensors, torch.load(path, mmap=True, weights_only=True), strict=True):
            tensor.copy_(saved)


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(function: Any, *args: Any) -> float:
    """Seconds until the slowest rank is through."""
    dist.barrier()
    start = time.perf_counter()
    function(*args)
    dist.barrier()
    return time.perf_counter() - start


def main() -> None:
    parser = cli.Parser(description="Time checkpoints against a bare torch.save of the same bytes.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; is made and removed again")
    parser.add_argument("--preset", default="moe-680m", help="model to save")
    parser.add_argument("--ds_config", type=Path, default=Path("ds_configs/zero2.json"), help="DeepSpeed JSON")
    parser.add_argument("--ep_size", type=int, default=1, help="ranks that share one set of experts")
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is measured")
    parser.add_argument("--background", action="store_true", help="measure saves beside training as well")
    parser.add_argument("--local_rank", help="given by the launcher; not used")
    args = parser.parse()
    if args.out.exists():
        raise UserError(f"{args.out} is there already; give a folder that can be made and removed.")
    rank, world_size, device = init_distributed()
    config, ds = load_preset(args.preset), read_json(args.ds_config)
    model = Decoder(config, 0, args.ep_size, rank % args.ep_size)
    engine = build_engine(model, {**ds, "gradient_accumulation_steps": 1}, read_schedule(ds, str(args.ds_config)))
    ids = torch.randint(config.vocab_size, (1, TOKENS), device=device)
    engine.backward(engine(ids, ids))
    engine.step()
    engine.optimizer.zero_grad()
