"""One reduction per step, compared with the reduction of every micro-batch by DeepSpeed's ZeRO-2."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from engines import batches, gradients_given, make
from ranks import run_ranks

from megamoe.training.collectives import Collectives
from megamoe.training.step import TrainStep, balancer_of

MICRO_BATCHES = 3, 2  # of the steps
SUMS_IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}, "gradient_clipping": 0.01}
PRECISIONS = {
    "fp32": {"gradient_clipping": 0.01},
    "bf16": {"bf16": {"enabled": True}, "communication_data_type": "fp32", **SUMS_IN_FP32},
}


def steps_of(ep_size, stage, changes, zero):
    """Of two steps of the same weights, for the first has a learning rate of 0: losses and norms, the gradients that
    the optimizer was given, the payload of the gradients' reductions before the last backward pass, at its end and
    after it, and elements of (shared weights, experts)."""
    ours = {"reduce_bucket_size": 5000} if stage == 2 else {"contiguous_gradients": False}  # it has no buckets
    zero = {"stage": stage, **ours, **zero}
    engine = make(ep_size, stage, gradient_accumulation_steps=MICRO_BATCHES[0], zero_optimization=zero, **changes)
    given = gradients_given(engine)
    end, passes, collectives = engine.optimizer.independent_gradient_partition_epilogue, [], Collectives()

    def note(_=None):
        passes.append({key: size for key, size in collectives.payload.items() if "reduce" in key[0]})

    engine.optimizer.independent_gradient_partition_epilogue = lambda: (note(), end())
    train_step, values, payloads = TrainStep(engine, balancer_of(engine.module)), [], []
    for number, micro_batches in enumerate(MICRO_BATCHES):
        train_step.accumulate(micro_batches)
        collectives.payload.clear()
        with collectives:
            train_step.forward_backward(batches(10 * number + dist.get_rank(), micro_batches, 2), note)
        result = train_step.update()
        assert result.applied
        values.append((result.loss, result.grad_norm))
        payloads.append(passes[-3:])
    sizes = Counter()
    for flat, is_expert in zip(engine.optimizer.bit16_groups_flat, engine.optimizer.is_moe_param_group, strict=True):
        sizes[is_expert] += flat.numel()
    return torch.tensor(values), given, payloads, (sizes[False], sizes[True])


def each_way(cases):
    return [(steps_of(ep_size, 1, *rest), steps_of(ep_size, 2, *rest)) for ep_size, *rest in cases]


def assert_same_steps(ours, theirs, share):
    torch.testing.assert_close(ours[0], theirs[0], rtol=share, atol=0)
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= share * other.norm()


@pytest.mark.parametrize(
    ("ranks", "ep_size", "precision"),
    [(1, 1, "bf16"), (2, 1, "bf16"), (2, 2, "fp32"), (4, 1, "fp32"), (4, 2, "bf16"), (4, 4, "bf16")],
)
def test_gradients_are_those_of_zero2_and_travel_once_after_the_last_backward_pass(ranks, ep_size, precision):
    cases = [(ep_size, PRECISIONS[precision], {"overlap_comm": overlaps}) for overlaps in (True, False)]
    for rank in run_ranks(ranks, each_way, cases):
        for (ours, theirs), (_, _, zero) in zip(rank, cases, strict=True):
            assert len(ours[1]) == 2 * 3  # shared with decay, shared without, experts
            assert_same_steps(ours, theirs, 2e-6)
            sizes = Counter({ranks: 4 * ours[3][0]})
            sizes[ranks // ep_size] += 4 * ours[3][1]
            once = {group: size for group, size in sizes.items() if group > 1}
            scattered = {("reduce_scatter", group): size for group, size in once.items()}
            assert ours[2] == [[{}, scattered if zero["overlap_comm"] else {}, scattered]] * 2
            for micro_batches, (*_, payload) in zip(MICRO_BATCHES, theirs[2], strict=True):
                assert payload.keys() == {("all_reduce", group) for group in once}
                for group, size in once.items():  # with the fill of the flat groups
                    assert payload["all_reduce", group] == pytest.approx(micro_batches * size, rel=1e-3)


def test_on_a_wire_of_16_bits_they_are_rounded_and_have_half_the_bytes():
    wires = ({**PRECISIONS["bf16"], "communication_data_type": wire} for wire in ("fp32", "bf16"))
    cases = [(1, changes, {"overlap_comm": True}) for changes in wires]
    for (exact, _), (ours, _) in run_ranks(2, each_way, cases):
        assert_same_steps(ours, exact, 4e-3)
        for (*_, whole), (*_, half) in zip(exact[2], ours[2], strict=True):
            assert whole == {("reduce_scatter", 2): 2 * half["reduce_scatter", 2]}
