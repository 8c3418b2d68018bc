"""Joining the other ranks, and what the optimizer is given."""

import os
from pathlib import Path

import torch
from engines import make
from ranks import run_new_ranks, run_ranks
from toy import PRESET

from megamoe.config import ModelConfig
from megamoe.model.decoder import Decoder
from megamoe.training.engine import parameter_groups


def shared_memory_of_this_job():
    total = torch.ones(1000)
    torch.distributed.all_reduce(total)
    torch.distributed.barrier()
    return [path.name for path in Path("/dev/shm").glob(f"*_{os.environ['MASTER_PORT']}_*")]


def test_a_job_leaves_nothing_in_shared_memory_even_if_it_is_killed():
    # Nothing is there while it runs, so no end of the processes can leave it behind.
    assert run_new_ranks(2, shared_memory_of_this_job) == [[], []]


def test_norms_and_latents_have_no_weight_decay_and_every_parameter_is_in_one_group():
    model = Decoder(ModelConfig(**PRESET))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model)
    assert sorted(names[parameter] for group in groups for parameter in group["params"]) == sorted(names.values())
    undecayed = {
        names[parameter] for group in groups if group.get("weight_decay") == 0 for parameter in group["params"]
    }
    assert undecayed == {name for name in names.values() if "norm" in name or "latents" in name}
    assert all("experts" in names[p] for group in groups if group.get("moe") for p in group["params"])


def throughput_timer(**changes):
    return make(1, **changes).tput_timer.config.enabled


def test_the_timer_that_waits_for_the_device_is_off_unless_it_is_asked_for():
    assert run_ranks(1, throughput_timer) == [False]
    assert run_ranks(1, timed_throughput) == [True]


def timed_throughput():
    return throughput_timer(timers={"throughput": {"enabled": True, "synchronized": False}})
