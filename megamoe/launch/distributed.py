"""Join the other ranks: rank, device, process group, and flags and errors of all ranks."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from megamoe.launch import cpu, gpu
from megamoe.launch.network import interface_towards
from megamoe.launch.rank_info import find_rank_info
from megamoe.launch.rendezvous import Rendezvous, join

NO_TIMEOUT = timedelta(days=1)  # a rank may restore for long; `launch/watch.py` detects deaths and stalls


def configure_deepspeed() -> None:
    """Before DeepSpeed joins a group: quiet its log, leave out an operator that only inference uses, and set what its
    groups and their collectives have by default."""
    # DeepSpeed 0.19 calls it; torch 2.13 renames it.
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*", category=FutureWarning)
    if "DS_LOG_LEVEL" not in os.environ:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it announces every layer and option at INFO
    # An all-reduce on CPU that it would compile at the first start, with buffers in /dev/shm that are never removed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Of the groups that it makes for experts, without a timeout of their own.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = NO_TIMEOUT
    # With `overlap_comm`, gradients are reduced on one communicator during an all-to-all on another. NCCL then keeps
    # the order in which the host has issued them, which is the same on all ranks; else two ranks may each begin with
    # another one, and wait for each other.
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    # `launch/watch.py` finds what has died or stalled, and ends all ranks with one code; torch's watchdog of NCCL would
    # abort the process before it can say why.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")


def init_distributed() -> tuple[Rendezvous, torch.device]:
    """Join the other ranks, or be a single rank without a launcher; returns the ranks, and this rank's device.

    Raises UserError where a rank is missing, has another megamoe, Python, torch or DeepSpeed, or shares its GPU.
    """
    configure_deepspeed()
    rank_info = find_rank_info(os.environ)
    os.environ.update(rank_info.environment())
    on_cpu = is_on_cpu()
    resources = cpu.share_cores() if on_cpu else gpu.use_expandable_segments()
    device, device_id = choose_device(rank_info.local_rank)
    rendezvous = join(rank_info, device=device_id)
    if on_cpu and len(set(rendezvous.hosts)) > 1:
        # Gloo would take the address of the host's name, which on many systems is 127.0.1.1.
        interface = interface_towards(rank_info.address)
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=NO_TIMEOUT)
    if rank_info.rank == 0:
        print(resources, flush=True)
    return rendezvous, device


def choose_device(local_rank: int) -> tuple[torch.device, str | None]:
    """This rank's device, made the current one, and what tells it from any other rank's; None on CPU, which ranks
    share."""
    if is_on_cpu():
        return torch.device("cpu"), None
    accelerator = get_accelerator()
    index = local_rank % accelerator.device_count()  # a launcher may show each rank its own device only
    accelerator.set_device(index)
    os.environ["LOCAL_RANK"] = str(index)  # which DeepSpeed takes for the index of the device
    device = torch.device(accelerator.device_name(index))
    return device, str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def this_device() -> torch.device:
    """The device of this rank, once it has joined the others."""
    return torch.device(get_accelerator().current_device_name())


def is_on_cpu() -> bool:
    """Whether the ranks of this machine train on CPU."""
    return get_accelerator().device_name() == "cpu"


def on_any_rank(*flags: bool, device: torch.device) -> list[bool]:
    """For each of the flags, whether it is set on any rank. Collective."""
    total = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return total.bool().tolist()


def raise_on_any_rank(problems: list[str]) -> None:
    """Share the problems of all ranks; if there are any, rank 0 prints them all and every rank exits with code 2.

    Collective. Raises SystemExit.
    """
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, problems)
    distinct = list(dict.fromkeys(problem for one in everywhere for problem in one))
    if not distinct:
        return
    if dist.get_rank() == 0:
        for problem in distinct:
            print(f"error: {problem}", file=sys.stderr, flush=True)
    dist.barrier()  # or the launcher could end rank 0 before it has printed
    sys.exit(2)
