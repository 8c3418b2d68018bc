"""Tensors without values on a device that is not the host: whatever would wait for a GPU, or mix devices, raises.

Only in a process of its own (`ranks.run_alone`): the device stays known to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from model_parts import with_fp32_statistics
from simulate import echo_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from megamoe.config.model import ModelConfig
from megamoe.launch.distributed import configure_deepspeed
from megamoe.model import all_to_all
from megamoe.model.decoder import Decoder
from megamoe.model.topology import ExpertTopology

DEVICE = "gpu"


class NoCopies(TorchDispatchMode):
    """Raises where an operator takes tensors of one device and gives one of another."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {one.device.type for one in tree_iter((args, kwargs, out)) if isinstance(one, Tensor)}
        assert len(devices) <= 1, f"{func} copies between {' and '.join(sorted(devices))}"
        return out


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Tensors made here have no values."""
    if not hasattr(torch, DEVICE):
        _setup_privateuseone_for_python_backend(DEVICE)
    torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16]  # asked for when activations are recomputed
    with FakeTensorMode(), NoCopies():
        yield


class HostReads:
    """Stands for `begin_read`: counts what is read, and gives `values`."""

    def __init__(self, values: Any):
        self.values = values
        self.count = 0

    def __call__(self, tensor: Tensor) -> Any:
        self.count += 1
        return lambda: self.values


def join_fake_ranks(world_size: int) -> None:
    """Become one of so many ranks, whose collectives move nothing; every peer seems to send what this rank sends."""
    if not dist.is_initialized():
        env = {"WORLD_SIZE": str(world_size), "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
        os.environ.update(env)
        configure_deepspeed()
        dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
        deepspeed.init_distributed(dist_backend="fake", verbose=False)
        dist.all_to_all_single = echo_of(dist.all_to_all_single)


def model_on_gpu(config: ModelConfig, ep_size: int = 1) -> Decoder:
    """In bf16, as on a rank of `ep_size` whose peers never answer."""
    if ep_size > 1:
        join_fake_ranks(ep_size)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = Decoder(config, seed=None, topology=ExpertTopology(config.num_local_experts, ep_size, ep_size))
    torch.set_default_dtype(torch.float32)
    with_fp32_statistics(model)
    if ep_size > 1:
        for layer in model.moe_layers():
            layer.set_deepspeed_parallelism()
    return model


def count_reads(values: Any) -> HostReads:
    """Replace `begin_read` in the layer."""
    reads = HostReads(values)
    all_to_all.begin_read = reads  # type: ignore[assignment]
    return reads
