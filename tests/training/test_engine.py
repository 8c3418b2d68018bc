"""Joining the other ranks, and what the optimizer is given."""

import os
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from engines import load_and_train, make, train_and_save
from ranks import run_new_ranks, run_ranks
from toy import PRESET

from megamoe.config.model import ModelConfig
from megamoe.model.decoder import Decoder
from megamoe.training import engine as module
from megamoe.training.engine import parameter_groups


def shared_memory_of_this_job():
    total = torch.ones(1000)
    torch.distributed.all_reduce(total)
    torch.distributed.barrier()
    return [path.name for path in Path("/dev/shm").glob(f"*_{os.environ['MASTER_PORT']}_*")]


def test_a_job_leaves_nothing_in_shared_memory_even_if_it_is_killed():
    # Nothing is there while it runs, so no end of the processes can leave it behind.
    assert run_new_ranks(2, shared_memory_of_this_job) == [[], []]


@pytest.mark.parametrize(
    "parts", [{}, {"attention_bias": True, "attention_out_bias": True, "qk_norm": "head"}], ids=["latents", "biases"]
)
def test_norms_biases_and_latents_have_no_weight_decay_and_every_parameter_is_in_one_group(parts):
    model = Decoder(ModelConfig(**{**PRESET, **parts}))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model)
    assert sorted(names[parameter] for group in groups for parameter in group["params"]) == sorted(names.values())
    undecayed = {
        names[parameter] for group in groups if group.get("weight_decay") == 0 for parameter in group["params"]
    }
    assert undecayed == {name for name in names.values() if any(word in name for word in ("norm", "latents", "bias"))}
    assert any("bias" in name for name in undecayed) == bool(parts)
    assert all("experts" in names[p] for group in groups if group.get("moe") for p in group["params"])


def resumed_with_groups_of(size, folder):
    """(the experts' groups, losses of two steps and of two more behind a save, of the two again after a resume)."""
    split = partial(module.split_params_into_different_moe_groups_for_optimizer, max_group_size=size)
    with mock.patch.object(module, "split_params_into_different_moe_groups_for_optimizer", split):
        groups = [len(group["params"]) for group in parameter_groups(make(2).module) if group.get("moe")]
        before, after = train_and_save(folder, 2, steps=2, further=2)
        return groups, before + after, load_and_train(folder / "step_2", 2, steps=2)[1]


def test_experts_larger_than_a_group_may_be_train_and_resume(tmp_path):
    whole, *_ = run_ranks(2, resumed_with_groups_of, 178_956_971, tmp_path / "whole")
    split, *_ = run_ranks(2, resumed_with_groups_of, 1000, tmp_path / "split")  # a stack has 6,144 numbers
    assert (whole[0], split[0]) == ([4], [1, 1, 1, 1])
    assert split[1] == pytest.approx(whole[1], rel=1e-6)
    assert split[1][2:] == split[2]


def throughput_timers(*timers):
    return [make(1, **one).tput_timer.config.enabled for one in timers]


def test_the_timer_that_waits_for_the_device_is_off_unless_it_is_asked_for():
    asked = {"timers": {"throughput": {"enabled": True, "synchronized": False}}}
    assert run_ranks(1, throughput_timers, {}, asked) == [[False, True]]
