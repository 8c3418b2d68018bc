"""Parameter groups and the only `deepspeed.initialize`."""

from __future__ import annotations

import copy
import logging
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError
from torch import nn
from torch.utils.cpp_extension import get_default_build_root

from megamoe.config import UserError
from megamoe.ds_config import ScheduleConfig
from megamoe.schedule import learning_rate

STALE_LOCK_MINUTES = 10


def quiet() -> None:
    """Silence what DeepSpeed says at INFO, and one warning about it."""
    # DeepSpeed 0.19 calls it; torch 2.13 renames it.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    if "DS_LOG_LEVEL" not in os.environ:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it announces every layer and option at INFO


def init_distributed() -> tuple[int, int, torch.device]:
    """Join the other ranks, or stand alone without a launcher; returns (rank, world size, device)."""
    quiet()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
        _refuse_stale_lock()
        if "OMP_NUM_THREADS" not in os.environ:
            # Each rank would start as many threads as there are cores.
            local_ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))
            torch.set_num_threads(max(len(os.sched_getaffinity(0)) // local_ranks, 1))
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    rank = deepspeed.comm.get_rank()
    if device.type == "cpu":
        _unname_shared_memory(rank)
    return rank, deepspeed.comm.get_world_size(), device


def _refuse_stale_lock() -> None:
    """Raise UserError where a killed start has left torch's lock on the operator that DeepSpeed compiles on CPU: torch
    would wait for it without end and without a word."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/deepspeed_shm_comm/lock"):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes > STALE_LOCK_MINUTES:
            raise UserError(
                f"{lock} is {minutes:.0f} minutes old, above the {STALE_LOCK_MINUTES} that a compilation takes at "
                "most: a start was killed while it compiled; remove that file and start again."
            )


def _unname_shared_memory(rank: int) -> None:
    """Let DeepSpeed's buffers for all-reduces within a host go with the processes that use them.

    It leaves 66 MiB per rank and port in /dev/shm for good. Every rank has opened them once initialization is over,
    so their names can be removed: the memory is freed when the last process ends, however it ends.
    """
    deepspeed.comm.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups: norms and latents without weight decay, the rest with, each split for DeepSpeed into shared
    and expert parameters."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (undecayed if "norm" in name or name.endswith("latents") else decayed).append(parameter)
    return split_params_into_different_moe_groups_for_optimizer(
        [
            {"name": "decayed", "params": decayed},
            {"name": "undecayed", "params": undecayed, "weight_decay": 0.0},
        ]
    )


def build_engine(model: nn.Module, ds: dict[str, Any], schedule: ScheduleConfig) -> deepspeed.DeepSpeedEngine:
    """Wrap `model` in DeepSpeed's engine. After N optimizer steps its learning rate is `learning_rate(N)`.

    Args:
        ds: the DeepSpeed JSON; its "scheduler" section is replaced by the exact schedule.
    """
    ds = copy.deepcopy(ds)
    ds.pop("scheduler", None)
    ds.setdefault("steps_per_print", None)  # megamoe's own lines say it
    # The group's learning rate is the peak; LambdaLR multiplies it by the schedule's share.
    ds["optimizer"].setdefault("params", {})["lr"] = schedule.warmup_max_lr

    def share_of_peak(step: int) -> float:
        rate = learning_rate(
            step,
            peak=schedule.warmup_max_lr,
            warmup_steps=schedule.warmup_num_steps,
            total_steps=schedule.total_num_steps,
            initial=schedule.warmup_min_lr,
        )
        return rate / schedule.warmup_max_lr

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model),
        config=ds,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak),
    )
    return engine


def deepspeed_own_problems(ds: dict[str, Any], where: str) -> list[str]:
    """What DeepSpeed's own configuration classes, or this device, refuse in a DeepSpeed JSON, one sentence each."""
    problems = []
    try:
        DeepSpeedConfig(copy.deepcopy(ds))
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            problems.append(f'{where}: DeepSpeed refuses "{key}" as {detail["input"]!r}: {detail["msg"]}; change it.')
    except (ValueError, AssertionError) as error:
        problems.append(f"{where}: DeepSpeed refuses it: {error}; change it.")
    if ds.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        problems.append(f"{where}: fp16 is enabled, but this device does not support it; use bf16 or fp32.")
    return problems
