"""Joining the other ranks, and what the optimizer is given."""

import os
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from engines import BATCH, CONFIG, load_and_train, make, train_and_save
from ranks import run_new_ranks, run_ranks
from toy import PRESET

from megamoe.config import ModelConfig
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


def norms_of_ours_and_deepspeeds(stage, changes, factor):
    """(norms of the groups, DeepSpeed's own of the same gradients, steps skipped and global norm after the step)."""
    engine = make(2, stage, **changes)
    optimizer = engine.optimizer
    torch.manual_seed(torch.distributed.get_rank())
    ids = torch.randint(CONFIG.vocab_size, (BATCH // 2, 16))
    engine.backward(engine(ids, ids) * (factor if torch.distributed.get_rank() == 0 else 1.0))
    seen = []
    ours = optimizer.get_grad_norm_direct

    def compared(gradients, params):
        gradients = list(gradients)
        theirs = DeepSpeedZeroOptimizer.get_grad_norm_direct(optimizer, gradients, params)
        seen.append((ours(gradients, params).item(), theirs.item()))
        return ours(gradients, params)

    optimizer.get_grad_norm_direct = compared
    engine.step()
    return seen, engine.skipped_steps, float(engine.get_global_grad_norm())


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (1, {"bf16": {"enabled": True}}),
        (2, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
        (2, {}),
    ],
)
def test_the_norm_of_gradients_is_deepspeeds_in_fp64(stage, changes):
    first, second = run_ranks(2, norms_of_ours_and_deepspeeds, stage, changes, 1.0)
    assert first == second
    seen, skipped, norm = first
    assert skipped == 0
    assert norm > 0
    assert len(seen) == 3  # shared with decay, shared without, experts
    for ours, theirs in seen:
        assert ours == pytest.approx(theirs, rel=1e-6)


def norm_of(value, size):
    engine = make(1)
    optimizer = engine.optimizer
    return optimizer.get_grad_norm_direct([torch.full((size,), value)], []).item()


def test_the_norm_of_many_small_values_loses_none():
    (norm,) = run_ranks(1, norm_of, 0.001, 2**25)
    assert norm == pytest.approx(0.001 * 2**12.5, rel=2e-4)


@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [{"bf16": {"enabled": True}}, {}])
def test_a_gradient_that_is_not_finite_on_one_rank_makes_all_skip_the_update(factor, dtype):
    for seen, skipped, _ in run_ranks(2, norms_of_ours_and_deepspeeds, 2, dtype, factor):
        assert -1 in {ours for ours, _ in seen}
        assert [ours for ours, _ in seen] == [theirs for _, theirs in seen]
        assert skipped == 1
