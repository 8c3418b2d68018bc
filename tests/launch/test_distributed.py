"""What the ranks need on GPUs, shown on CPU: devices, timeouts, and the order of their collectives."""

import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import deepspeed
import pytest
import torch
import torch.distributed as dist
from engines import CONFIG
from ranks import run_alone, run_ranks
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from toy import ds_config, recipe_of

from megamoe.config.run import RunConfig
from megamoe.data.batches import Batch
from megamoe.launch import distributed
from megamoe.launch.distributed import NO_TIMEOUT, choose_device, configure_deepspeed
from megamoe.training.step import build_train_step


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 7, 7), (1, 7, 0), (2, 5, 1)], ids=str)
def test_a_rank_and_deepspeeds_engine_take_one_device_however_many_the_rank_sees(
    visible, local_rank, index, monkeypatch
):
    names = {None: "cuda", index: f"cuda:{index}"}
    gpus = Mock(device_count=lambda: visible, device_name=lambda index=None: names[index])
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(distributed, "get_accelerator", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device}"))
    assert choose_device(local_rank) == (torch.device("cuda", index), f"GPU-cuda:{index}")
    assert gpus.set_device.call_args == call(index)

    engine = SimpleNamespace()
    monkeypatch.setattr(deepspeed.runtime.engine, "get_accelerator", lambda: gpus)
    monkeypatch.setattr(deepspeed.runtime.engine, "dist", SimpleNamespace(get_world_size=int, get_rank=int))
    deepspeed.DeepSpeedEngine._configure_with_arguments(engine, None, None)
    deepspeed.DeepSpeedEngine._set_distributed_vars(engine, None)
    assert engine.device == torch.device("cuda", index)


def timeouts():
    """Of every group that exists with an engine, and what NCCL's groups would get."""
    build_train_step(CONFIG, recipe_of(ds_config(2)), ep_size=2)
    groups = distributed_c10d._world.pg_map
    found = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    return len(groups), found, distributed_c10d._get_default_timeout("nccl")


def test_every_group_of_an_engine_waits_as_long_as_the_first():
    for count, found, of_nccl in run_ranks(4, timeouts):
        assert count > 3  # all ranks, experts, replicas of experts
        assert found == {of_nccl} == {NO_TIMEOUT}


def test_a_stall_is_reported_before_a_group_times_out():
    (limit,) = (rule.lt for rule in RunConfig.model_fields["collective_timeout"].metadata if hasattr(rule, "lt"))
    assert limit == NO_TIMEOUT.total_seconds()


class Order(TorchDispatchMode):
    """The collectives that this rank issues, over all groups: kind, size and stride of the group, and the number of
    elements where all ranks of a group must agree on it."""

    def __init__(self):
        super().__init__()
        self.issued = []
        self.rows = []  # sent by each exchange

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            group = next(
                one for one in args if isinstance(one, torch.ScriptObject) and "ProcessGroup" in str(one._type())
            )
            ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
            elements = sum(one.numel() for one in tree_iter(args[:2]) if isinstance(one, torch.Tensor))
            if name == "alltoall_base_":
                self.rows.append(args[1].numel())
                elements = None
            self.issued.append((name, len(ranks), (ranks[-1] - ranks[0]) // max(len(ranks) - 1, 1), elements))
        return func(*args, **(kwargs or {}))


def collectives_of_four_steps():
    """The order of the collectives on this rank, and the rows of its exchanges. In the last two steps no token goes to
    the experts of the second rank of a group."""
    zero = {**ds_config(2)["zero_optimization"], "overlap_comm": True, "reduce_bucket_size": 4000}
    train_step = build_train_step(CONFIG, recipe_of(ds_config(2, zero_optimization=zero)), ep_size=2)
    with Order() as order:
        for step in range(4):
            if step == 2:
                for router in train_step.model.routers():
                    router.selection_bias[len(router.selection_bias) // 2 :] = -100
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            ids = torch.randint(CONFIG.vocab_size, (2, 17), generator=generator)
            train_step.forward_backward([Batch(ids[:, :-1], ids[:, 1:])])
            train_step.update()
    return order.issued, order.rows


def test_all_ranks_issue_their_collectives_over_all_groups_in_one_order():
    found = run_ranks(4, collectives_of_four_steps)
    orders, rows = zip(*found, strict=True)
    assert all(order == orders[0] for order in orders)
    assert len({tuple(one) for one in rows}) == 4  # though each has rows of its own
    assert all(0 in one for one in (rows[1], rows[3]))
    # The reductions of one layer's gradients come before the exchanges of the next: the groups are in use together.
    kinds = [(kind, size, stride) for kind, size, stride, _ in orders[0]]
    exchange, reductions = ("alltoall_base_", 2, 1), {("allreduce_", 4, 1), ("allreduce_", 2, 2)}
    first, last = kinds.index(exchange), len(kinds) - kinds[::-1].index(exchange)
    assert reductions <= set(kinds[first:last])
    assert len(kinds) > 4 * 2 * 5


def nccl_settings(environment):
    os.environ.update(environment)
    configure_deepspeed()
    return {name: value for name, value in os.environ.items() if "NCCL_" in name}


def test_nccl_keeps_the_order_of_the_host_and_leaves_it_to_us_to_end_ranks_unless_the_user_says_otherwise():
    header = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp"
    settings = run_alone(nccl_settings, {})
    assert settings.pop("NCCL_LAUNCH_ORDER_IMPLICIT") == "1"
    assert [*settings.values()] == ["0", "0"]  # torch's watchdog does not end a rank before it says why
    assert all(name.startswith("TORCH_NCCL_") and f'"{name}"' in header.read_text() for name in settings)
    given = {"NCCL_LAUNCH_ORDER_IMPLICIT": "0"}
    assert run_alone(nccl_settings, given).items() >= given.items()
