"""Joining the other ranks, and what the optimizer is given."""

import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from toy import PRESET

from megamoe.config import ModelConfig, UserError
from megamoe.engine import _refuse_stale_lock, parameter_groups
from megamoe.model import Decoder


def shared_memory_of_this_job():
    total = torch.ones(1000)
    torch.distributed.all_reduce(total)
    torch.distributed.barrier()
    return [path.name for path in Path("/dev/shm").glob(f"*_{os.environ['MASTER_PORT']}_*")]


def test_a_job_leaves_nothing_in_shared_memory_even_if_it_is_killed():
    # The names are gone while it runs, so no end of the processes can leave them behind.
    assert run_ranks(2, shared_memory_of_this_job) == [[], []]


def test_a_lock_left_by_a_killed_compilation_is_named_instead_of_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py3" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    _refuse_stale_lock()  # somebody is compiling now
    os.utime(lock, (0, 0))
    with pytest.raises(UserError, match=f"{lock} is .* remove that file"):
        _refuse_stale_lock()


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
