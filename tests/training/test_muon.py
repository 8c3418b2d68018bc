"""Muon on the ranks' shares of flat groups against Muon on whole matrices in fp64."""

from collections import defaultdict

import pytest
import torch
import torch.distributed as dist
from engines import CONFIG, GATED, gradients_given, make, train
from ranks import run_ranks

from megamoe.checkpoint.engine_state import stretches_by_group
from megamoe.model.names import split_expert
from megamoe.training.matrix_share import MatrixShare
from megamoe.training.muon import orthogonalize, orthogonalize_share

PARAMS = {"muon_lr": 0.05, "momentum": 0.9, "betas": [0.8, 0.95], "eps": 1e-7, "weight_decay": 0.2}
JSON = {"optimizer": {"type": "Muon", "params": PARAMS}, "gradient_clipping": 0.5}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
STEPS = 3
# Half of its shared and of its expert matrices end within one.
UNEVEN = GATED.model_copy(update={"num_local_experts": 7, "first_k_dense_replace": 1})


def by_name(engine, flats):
    """This rank's stretches of plain parameters in one flat tensor per group: [(name, shape, start, values)]."""
    return [
        (one.name, one.shape, one.start, flat[one.offset : one.offset + one.count].clone())
        for flat, held in zip(flats, stretches_by_group(engine), strict=True)
        for one in held
    ]


def steps_of(config, ep_size, stage, changes):
    """(masters before, for each step the gradients that the optimizer gets, masters after), and the learning rate of
    each step, as `by_name` has it."""
    engine = make(ep_size, stage, config=config, **JSON, **changes)
    masters = [one.detach() for one in engine.optimizer.single_partition_of_fp32_groups]
    seen, rates, given = [by_name(engine, masters)], [], gradients_given(engine)
    for number in range(STEPS):
        rates.append(engine.get_lr()[0])
        train(engine, 1, number)
        seen.append(by_name(engine, given))
        given.clear()
    return [*seen, by_name(engine, masters)], rates


def whole(results, number):
    """Parameters by plain name, put together of all ranks' stretches, and on how many ranks each is."""
    values, ranks = {}, defaultdict(set)
    for rank, (seen, _) in enumerate(results):
        for name, shape, start, stretch in seen[number]:
            flat = values.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float64)).view(-1)
            flat[start : start + len(stretch)] = stretch.double()
            ranks[name].add(rank)
    assert not any(value.isnan().any() for value in values.values())
    return values, ranks


def is_muons(name):
    """By the end of its name, as the document of optimizers lists them."""
    return name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def polynomial(gradient):
    """Newton-Schulz by the singular values: each goes through 3.4445 s - 4.775 s^3 + 2.0315 s^5 five times."""
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right * max(1, gradient.shape[0] / gradient.shape[1]) ** 0.5


def reference(master, gradients, rates, by_muon, decays):
    """The master after steps by Muon or AdamW, as the papers have them."""
    first, second = torch.zeros_like(master), torch.zeros_like(master)
    for count, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        if by_muon:
            first = 0.9 * first + 0.1 * gradient
            rate *= PARAMS["muon_lr"] / 1e-2  # the schedule's peak
            update = polynomial(0.9 * first + 0.1 * gradient)
        else:
            first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient**2
            update = first / (1 - 0.8**count) / ((second / (1 - 0.95**count)).sqrt() + 1e-7)
        master = master - rate * (update + (0.2 * master if decays else 0))
    return master


# Rounded to 16 bits, what is 0 but for rounding in a gradient of few tokens is not so behind five steps.
CASES = {
    "cut": (2, UNEVEN, 1, 2, {}, 1e-4),
    "ZeRO-1, expert parallel": (2, GATED, 2, 1, {}, 1e-4),
    "bf16, cut": (2, UNEVEN, 1, 2, BF16, 0.25),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_muon_on_whole_matrices_and_of_adamw_for_the_others(case):
    ranks, *args, tolerance = CASES[case]
    results = run_ranks(ranks, steps_of, *args)
    before, on_ranks = whole(results, 0)
    gradients = [whole(results, 1 + step)[0] for step in range(STEPS)]
    after, _ = whole(results, 1 + STEPS)
    rates = results[0][1]
    assert 0 == rates[0] < rates[1] < rates[2]
    assert any(is_muons(name) and split_expert(name) for name in before)
    cut = {split_expert(name) is None for name, held in on_ranks.items() if is_muons(name) and len(held) == 2}
    assert cut == ({True, False} if "cut" in case else set())
    for name, master in before.items():
        by_muon = is_muons(name)
        decays = not ("norm" in name or "latents" in name)
        expected = reference(master, [one[name] for one in gradients], rates, by_muon, decays)
        change, difference = (expected - master).norm(), (after[name] - expected).norm()
        assert change > 0, name
        assert difference <= (tolerance if by_muon else 1e-4) * change, name


def batches_of_one_rank():
    """The matrices that are multiplied at once, of shared and of expert parameters: (number, R, C)."""
    muon = make(1, **JSON).optimizer.optimizer
    shares = [muon._shares[group["params"][0]][0] for group in muon.param_groups if group["use_muon"]]
    return [[(run.count, run.rows, run.columns) for run in share.whole] for share in shares]


def test_shared_matrices_of_one_shape_are_multiplied_together_whatever_their_layers():
    ((shared, experts),) = run_ranks(1, batches_of_one_rank)
    shapes = [shape for _, *shape in shared]
    assert len(shapes) == len({tuple(shape) for shape in shapes}) > 1
    assert sum(count for count, *_ in shared) == 4 * CONFIG.num_hidden_layers
    assert len(experts) == 2 * CONFIG.num_hidden_layers


# --- without an engine ----------------------------------------------------------------------------------------------

SHAPES = [(4, 6), (4, 6), (40, 5), (3, 9), (2, 2)]  # the third is on all of four ranks


def share_of(partition):
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(partition * dist.get_world_size(), generator=generator)
    rank = dist.get_rank()
    part = flat[rank * partition : (rank + 1) * partition].clone()
    share = MatrixShare(SHAPES, partition, rank, dist.get_world_size())
    orthogonalize_share(part, share, dist.group.WORLD, torch.float32)
    return flat, part


def test_a_matrix_on_many_ranks_is_put_together_and_given_back():
    results = run_ranks(4, share_of, 70)
    flat, found = results[0][0], torch.cat([part for _, part in results])
    start = 0
    for rows, columns in SHAPES:
        end = start + rows * columns
        expected = polynomial(flat[start:end].view(rows, columns).double())
        torch.testing.assert_close(found[start:end].view(rows, columns).double(), expected, rtol=0, atol=1e-4)
        start = end
    assert torch.equal(found[start:], flat[start:])


def test_a_zero_matrix_stays_zero_next_to_others():
    matrices = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))
    matrices[1] = 0
    found = orthogonalize(matrices, torch.float32)
    assert not found[1].any()
    for number in (0, 2):
        torch.testing.assert_close(found[number].double(), polynomial(matrices[number].double()), rtol=0, atol=1e-4)
