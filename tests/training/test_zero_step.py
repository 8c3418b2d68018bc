"""The step of the ZeRO optimizer, compared with DeepSpeed's own."""

import itertools
from unittest.mock import patch

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from engines import BATCH, batches, gradients_given
from engines import make as make_engine
from ranks import run_ranks
from streams import Device

from megamoe.config.recipe import Recipe
from megamoe.training.reduce_once import ReduceOnceOptimizer
from megamoe.training.step import TrainStep, balancer_of
from megamoe.training.zero_step import GivenNormOptimizer, GuardedOptimizer, norm_of

BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "loss_scale": 128}}
GROWING = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 7, "loss_scale_window": 1}}
SUMS_APART = {"data_types": {"grad_accum_dtype": "fp32"}}


def own_batches(step, accumulation=1):
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return batches(100 * step + rank, accumulation, BATCH // ranks)


def make(*args, **changes):
    # DeepSpeed does not ask torch, which has every operation in fp16, but for the speed of the processor.
    with patch.object(get_accelerator(), "is_fp16_supported", return_value=True):
        return make_engine(*args, **changes)


def train_step_of(engine):
    return TrainStep(engine, balancer_of(engine.module))


def two_steps(changes, stage, accumulation, own):
    """Losses and norms, by DeepSpeed's `own` step or by ours; then the gradients that its optimizer was given, and the
    loss scale after the last step.

    The first step has a learning rate of 0, so the second has the same weights.
    """
    with patch.object(Recipe, "reduces_once", stage == 1 and not own):
        engine = make(2, stage, gradient_accumulation_steps=accumulation, **changes)
    assert type(engine.optimizer) is (GivenNormOptimizer if stage == 2 or own else ReduceOnceOptimizer)
    if own:
        engine.optimizer.__class__ = GuardedOptimizer  # without a spike to look for, DeepSpeed's own
    given = gradients_given(engine)
    train_step, values = train_step_of(engine), []
    for number in range(2):
        train_step.forward_backward(own_batches(number, accumulation))
        result = train_step.update()
        assert result.applied
        values.append((result.loss, result.grad_norm))
    return torch.tensor(values), given, engine.optimizer.loss_scale


CASES = {
    "fp32, no clipping": (2, {"gradient_clipping": 0}),
    "bf16, ZeRO-1": (1, {**BF16, "gradient_clipping": 0.01}),
    "bf16, sums in fp32": (2, {**BF16, **SUMS_APART, "gradient_clipping": 0.01}),
    # Its own step rounds the sums of experts without replicas to the wire's precision.
    "fp16, ZeRO-1, sums in fp32": (
        1,
        {**FP16, **SUMS_APART, "communication_data_type": "fp32", "gradient_clipping": 0.01},
    ),
}


def both_ways(stage, changes, theirs):
    """`two_steps` by our step, and by DeepSpeed's own with the changes `theirs`."""
    return two_steps(changes, stage, 2, False), two_steps(theirs, stage, 2, True)


@pytest.mark.parametrize("case", CASES)
def test_norm_and_clipped_gradients_are_those_of_deepspeeds_own_step(case):
    stage, changes = CASES[case]
    assert_same_steps(*run_ranks(2, both_ways, stage, changes, changes)[1])


def steps_on_streams(stage):
    """By our step and by DeepSpeed's own: as `two_steps`, then how often the host waits for the device."""
    found = []
    for own in (False, True):
        with Device().recorded(), patch.object(Device, "synchronize") as synchronize:
            results = two_steps({"zero_optimization": {"overlap_comm": True}}, stage, 2, own)
        found.append((results, synchronize.call_count))
    return found


@pytest.mark.parametrize("stage", [1, 2])
def test_the_host_does_not_wait_for_the_reductions_of_a_backward_pass(stage):
    (results, waits), (theirs, their_waits) = run_ranks(2, steps_on_streams, stage)[1]
    assert their_waits > 0
    assert waits == 0
    assert_same_steps(results, theirs)


def assert_same_steps(ours, theirs):
    (values, here, _), (other_values, there, _) = ours, theirs
    torch.testing.assert_close(values, other_values, rtol=1e-6, atol=0)
    assert len(here) == len(there) == 2 * 3  # shared with decay, shared without, experts
    for one, other in zip(here, there, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("changes", [{"gradient_clipping": 0.01}, {**SUMS_APART, "gradient_clipping": 0}])
def test_a_step_after_which_the_scale_grows_has_the_gradients_of_a_static_scale(changes):
    # DeepSpeed's own step divides by the scale of the next step, so the one compared with has a static scale.
    ours, theirs = run_ranks(2, both_ways, 2, {**GROWING, **changes}, {**FP16, **changes})[1]
    assert (ours[2], theirs[2]) == (256, 128)
    assert_same_steps(ours, theirs)


def factor_of_one_rank(cases):
    found = []
    for stage, changes, factor in cases:
        engine = make(2, stage, **changes)
        before = [part.detach().clone() for part in engine.optimizer.single_partition_of_fp32_groups]
        train_step = train_step_of(engine)
        (batch,) = own_batches(0)
        factor = factor if torch.distributed.get_rank() == 0 else 1.0
        engine.backward(engine(batch.input_ids, batch.labels) * factor)
        result = train_step.update()
        after = engine.optimizer.single_partition_of_fp32_groups
        kept = all(itertools.starmap(torch.equal, zip(before, after, strict=True)))
        found.append((result.applied, result.grad_norm, kept, engine.skipped_steps))
    return found


def test_a_gradient_that_is_not_finite_on_one_rank_makes_all_skip_the_update():
    cases = [(1, BF16, torch.inf), (2, {**BF16, **SUMS_APART}, torch.nan), (2, {}, torch.nan), (2, FP16, torch.inf)]
    assert run_ranks(2, factor_of_one_rank, cases) == [[(False, torch.inf, True, 1)] * len(cases)] * 2


def test_the_norm_of_many_small_values_loses_none():
    optimizer = object.__new__(GivenNormOptimizer)
    optimizer.averaged_gradients = {0: [torch.full((2**25,), 0.001)]}
    assert norm_of(optimizer.sum_of_squares().item()) == pytest.approx(0.001 * 2**12.5, rel=2e-4)


# --- steps that are skipped as spikes -------------------------------------------------------------------------------

OFFLOAD = {
    "zero_optimization": {
        "stage": 2, "contiguous_gradients": True, "reduce_scatter": True, "offload_optimizer": {"device": "cpu"},
    }
}  # fmt: skip


def whole_state(train_step):
    """All of this rank's state that a step may change."""
    engine = train_step.engine
    zero = engine.optimizer
    tensors = [*zero.single_partition_of_fp32_groups, *engine.module.state_dict().values(), engine.module.step_losses]
    states = [zero.optimizer.state[master] for master in zero.single_partition_of_fp32_groups]
    numbers = [value for state in states for value in state.values() if not isinstance(value, torch.Tensor)]
    tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    tensors += [router.step_counts for router in engine.module.routers()]
    gradients = [weight.grad for weight in engine.module.parameters() if weight.grad is not None]
    plain = (numbers, vars(zero.loss_scaler).copy(), engine.lr_scheduler.state_dict()["last_epoch"], len(gradients))
    return [tensor.detach().clone() for tensor in tensors], (*plain, engine.skipped_steps)


def with_and_without_spike(stage, changes, accumulation):
    """The states (before, after) of a step that is a spike, those of the next step with and without it, and results."""

    def one_step(train_step, number, factor=1.0):
        for batch in own_batches(number, accumulation):
            engine = train_step.engine
            loss = engine(batch.input_ids, batch.labels)
            engine.backward(loss * (factor if torch.distributed.get_rank() == 1 else 1.0))
            if not engine.is_gradient_accumulation_boundary():
                engine.step()
        return train_step.update(skips=lambda loss, norm: norm > 10)

    def fresh():
        train_step = train_step_of(make(2, stage, gradient_accumulation_steps=accumulation, **changes))
        for number in range(2):  # the first has a learning rate of 0
            assert one_step(train_step, number).applied
        return train_step

    without = fresh()
    one_step(without, 3)
    with_spike = fresh()
    before = whole_state(with_spike)
    spike = one_step(with_spike, 2, 100.0 if "fp16" in changes else 1e4)
    after = whole_state(with_spike)
    result = one_step(with_spike, 3)
    return before, after, whole_state(without), whole_state(with_spike), spike, result


SPIKES = {
    "bf16, ZeRO-1, accumulated, Muon": (
        1,
        {**BF16, **SUMS_APART, "optimizer": {"type": "Muon", "params": {"muon_lr": 0.05}}},
        2,
    ),
    "fp16, growing scale": (2, {**GROWING, **SUMS_APART}, 1),
    "offloaded, bf16, accumulated": (2, {**OFFLOAD, **BF16}, 2),
}


@pytest.mark.parametrize("case", SPIKES)
def test_a_step_that_is_a_spike_leaves_bit_for_bit_the_state_before_it(case):
    for before, after, without, with_spike, spike, result in run_ranks(2, with_and_without_spike, *SPIKES[case]):
        assert (spike.applied, spike.is_spike, spike.balance) == (False, True, None)
        assert 10 < spike.grad_norm < torch.inf
        assert (result.applied, result.is_spike) == (True, False)
        for (one, numbers), (other, other_numbers) in ((before, after), (without, with_spike)):
            assert numbers == other_numbers
            assert all(itertools.starmap(torch.equal, zip(one, other, strict=True)))
        assert not all(itertools.starmap(torch.equal, zip(after[0], with_spike[0], strict=True)))
