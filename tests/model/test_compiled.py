"""Compiled blocks: what eager ones compute, in few kernels, compiled once."""

from collections import Counter

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from devices import DEVICES
from engines import save
from operators import Operators
from ranks import run_new_ranks, run_ranks
from torch._dynamo.utils import counters
from toy import PRESET, ds_config, train_here, write_inputs

from megamoe.checkpoint.restore import restore_first_verified
from megamoe.config import ModelConfig, load_preset
from megamoe.data.batches import Batch
from megamoe.model import dispatch
from megamoe.model.compiled import activate, after_experts, compile_region
from megamoe.model.decoder import Decoder
from megamoe.model.generation import generate
from megamoe.planning.step_profile import profile_step
from megamoe.training.step import balancer_of, build_train_step

CONFIG = load_preset("tiny").model_copy(
    update={"num_hidden_layers": 3, "expert_dropout": 0.05, "router_jitter_noise": 0.3}
)
BATCH, LENGTH, STEPS = 2, 16, 20


def decoder(dtype, **changes):
    model = Decoder(CONFIG.model_copy(update=changes)).to(dtype)
    for router in model.routers():
        router.selection_bias, router.running_load = router.selection_bias.float(), router.running_load.float()
    return model


def prepared(model, step):
    """Random tokens, and biases and seeds that depend on the step; so does the routing, then."""
    generator = torch.Generator().manual_seed(step)
    for router in model.routers():
        router.selection_bias.normal_(0, 0.05, generator=generator)
    torch.manual_seed(step)  # of dropout and jitter
    model.zero_grad()
    return torch.randint(CONFIG.vocab_size, (BATCH, LENGTH), generator=generator)


def training_pass(model, step):
    """(loss, gradients in one vector)."""
    ids = prepared(model, step)
    loss = model(ids, ids)
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten().double() for weight in model.parameters()])


def slots_of(model):
    """(layers, experts), counted since the last call."""
    counts = torch.stack([router.step_counts for router in model.routers()])
    for router in model.routers():
        router.step_counts.zero_()
    return counts


class Kernels:
    """What inductor schedules while it is in use: kernels that it generates for each graph."""

    def __enter__(self):
        self.graphs = []
        torch._inductor.config._post_fusion_custom_pass = self._scheduled
        return self

    def __exit__(self, *_):
        torch._inductor.config._post_fusion_custom_pass = None

    def _scheduled(self, nodes):
        # What torch has a kernel for is called as an operator, and counted as one.
        self.graphs.append(sum(type(node).__name__ not in NO_KERNELS for node in nodes))
        return nodes


NO_KERNELS = ("ExternKernelSchedulerNode", "NopKernelSchedulerNode")


class RunOperators(Operators):
    """Those that run outside of generated kernels."""

    @classmethod
    def ignore_compile_internals(cls):
        return True


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("dtype", "loss_error", "gradient_error"),
    [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-3, 2e-2)],
    ids=["fp32", "bf16"],
)
def test_losses_and_gradients_are_the_eager_ones_to_rounding_by_one_compilation_of_two_regions(
    dtype, loss_error, gradient_error, monkeypatch
):
    monkeypatch.setattr(dispatch, "CPU_ROW_MULTIPLE", 4)  # so that the fill changes with the routing
    eager, ours = decoder(dtype), decoder(dtype)
    ours.compile_blocks()
    ours.recompute_blocks = 1
    seen, same = set(), 0
    for step in range(STEPS):
        expected, gradient = training_pass(eager, step)
        with torch._dynamo.config.patch(error_on_recompile=True):
            loss, found = training_pass(ours, step)
        assert loss == pytest.approx(expected, rel=loss_error)
        counts, others = slots_of(ours), slots_of(eager)
        assert counts.sum() == others.sum() == BATCH * LENGTH * CONFIG.num_experts_per_tok * len(counts)
        if torch.equal(counts, others):  # rounding to bf16 may send a token to another expert
            assert (found - gradient).norm() < gradient_error * gradient.norm()
            same += 1
        seen.add(tuple(counts.flatten().tolist()))
    assert len(seen) == STEPS
    assert same == STEPS if dtype == torch.float32 else same > STEPS // 2
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("parts", "most"), [({}, 72), ({"gated_mlp": True, "router_score": "sigmoid"}, 75)], ids=["full", "gated, sigmoid"]
)
def test_a_layer_has_at_most_so_many_kernels(parts, most, monkeypatch):
    monkeypatch.setattr(dispatch, "CPU_ROW_MULTIPLE", 1)  # a GPU's rows have no fill
    calls = []
    with Kernels() as kernels:
        for layers in (2, 3):
            model = decoder(torch.bfloat16, num_hidden_layers=layers, **parts)
            model.compile_blocks()
            training_pass(model, 0)  # compiles
            ids = prepared(model, 1)
            with RunOperators() as operators:
                model(ids, ids).backward()
            calls.append(operators.calls)
    outside: Counter = calls[1] - calls[0]
    outside.pop("empty")  # which is no kernel
    assert outside["_grouped_mm"] == 6
    assert outside.total() + sum(kernels.graphs) <= most


def launched(device, layers, is_compiled):
    """Kernels of one forward and backward pass on a GPU; on CPU operators, views among them."""
    model = decoder(torch.bfloat16, num_hidden_layers=layers).to(device)
    if is_compiled:
        model.compile_blocks()
    ids = torch.arange(BATCH * LENGTH, device=device).view(BATCH, LENGTH)

    def both_passes():
        model.zero_grad()
        model(ids, ids).backward()

    profile = profile_step(both_passes, torch.device(device))
    return profile.kernels if device == "cuda" else profile.operators


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_layer_gives_the_device_less_to_do_than_an_eager_one(device, record_property):
    eager, compiled = (
        launched(device, 3, is_compiled) - launched(device, 2, is_compiled) for is_compiled in (False, True)
    )
    record_property("kernels of one layer, eager", eager)
    record_property("kernels of one layer, compiled", compiled)
    assert 0 < compiled < eager


def check_any_rows(region, eager, inputs, numbers=(5, 1, 2, 64)):
    """Compare results and gradients at these numbers of rows, which one compilation serves.

    Args:
        inputs: the arguments for a number of rows.
    """
    for rows in numbers:
        pair = []
        with torch._dynamo.config.patch(error_on_recompile=True):
            for function in (region, eager):
                torch.manual_seed(rows)
                arguments = inputs(rows)
                out = function(*arguments)
                leaves = [one for one in arguments if isinstance(one, torch.Tensor) and one.requires_grad]
                pair.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for found, expected in zip(*pair, strict=True):
            torch.testing.assert_close(found, expected)


def random(*shape):
    return torch.randn(*shape, requires_grad=True)


def test_any_number_of_rows_goes_through_one_compilation_of_the_activation():
    experts = decoder(torch.float32, gated_mlp=True).layers[0].moe.experts
    check_any_rows(compile_region(activate, 1), activate, lambda rows: (experts, random(rows, 12)), (5, 0, 1, 2, 64))


def test_any_number_of_rows_goes_through_one_compilation_of_the_combination():
    def inputs(rows):  # one token, one choice, and fill
        token, place = torch.zeros(rows, dtype=torch.int64), torch.tensor([rows - 1])
        return random(1, 1, 8), random(rows, 8), random(1, 1), token, place

    check_any_rows(compile_region(after_experts, 1, 3), after_experts, inputs)


def test_evaluation_padding_and_generation_are_eager():
    def refuse(*_):
        raise AssertionError("compiled")

    model = decoder(torch.float32)
    ids = torch.arange(12).view(2, 6)
    for block in model.layers:
        block.compiled = refuse
    with pytest.raises(AssertionError, match="compiled"):
        model(ids, ids)
    model(ids, ids, attention_mask=ids > 0)
    model.eval()(ids, ids)
    generate(model, [[1, 2, 3]], 2)


MIXED = {
    "num_latent_tokens": 0,
    "first_k_dense_replace": 1,
    "sliding_window": 5,
    "qk_norm": "head",
    "partial_rotary_factor": 0.5,
    "gated_mlp": True,
    "n_shared_experts": 1,
    "shared_expert_gate": True,
    "router_score": "sigmoid",
    "n_group": 2,
    "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.01,
    "num_nextn_predict_layers": 1,
}
COMPRESSED = {
    "num_latent_tokens": 0,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


QUANTILE = {"router_bias_rule": "quantile", "num_nextn_predict_layers": 1}


@pytest.mark.parametrize("parts", [MIXED, COMPRESSED, QUANTILE], ids=["mixed", "latent_attention", "quantile"])
def test_blocks_of_every_part_give_the_losses_of_eager_ones(parts):
    def passes(compiled):
        model = decoder(torch.float32, **parts)
        if compiled:
            model.compile_blocks()
        results = []
        for step in range(2):
            ids = prepared(model, step)
            labels = torch.cat((ids, ids[:, :1]), dim=1)[:, : LENGTH + model.config.num_nextn_predict_layers]
            model(ids, labels).backward()
            gradients = torch.cat([weight.grad.flatten().double() for weight in model.parameters()])
            results.append((model.step_losses.clone(), slots_of(model), balancer_of(model).take_margins(), gradients))
        return results

    torch._dynamo.reset()
    for (losses, slots, margins, gradients), expected in zip(passes(True), passes(False), strict=True):
        torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=0)
        assert torch.equal(slots, expected[1])
        assert margins.sum() == expected[2].sum()  # a margin may be rounded into the next bin
        assert (margins - expected[2]).abs().sum() <= 0.01 * margins.sum()
        assert (gradients - expected[3]).norm() < 1e-5 * expected[3].norm()


# --- in the engine --------------------------------------------------------------------------------------------------

EXPERTS = {"gated_mlp": True, "expert_dropout": 0.1, "router_jitter_noise": 0.01}


def train_step_of(compiled_blocks):
    ds = ds_config(micro_batch=2, accumulation=2)
    config = ModelConfig(**{**PRESET, **EXPERTS})
    return build_train_step(config, ds, ep_size=2, recompute_blocks=1, compiled=compiled_blocks)


def losses_of(train_step, steps):
    losses = []
    for step in steps:
        for router in train_step.model.routers() if step == 1 else ():
            router.selection_bias += torch.tensor([9.0, 9.0, 0.0, 0.0])  # the second rank's experts get nothing
        torch.manual_seed(10 * step + dist.get_rank())
        batches = torch.randint(PRESET["vocab_size"], (2, 2, 2, 16))
        train_step.forward_backward([Batch(*batch) for batch in batches])
        losses.append(train_step.update().loss)
    return losses


def eager_compiled_and_resumed(folder):
    expected = losses_of(train_step_of(False), range(6))
    ours = train_step_of(True)
    losses = losses_of(ours, range(3))
    save(ours.engine, folder, 3)
    losses += losses_of(ours, range(3, 6))
    again = train_step_of(True)
    restore_first_verified(again.engine, [folder / "step_3"])
    return expected, losses, losses_of(again, range(3, 6)), dict(counters["stats"])


def test_a_compiled_run_among_ranks_has_the_eager_losses_and_resumes_to_the_bit(tmp_path):
    for expected, losses, resumed, stats in run_new_ranks(2, eager_compiled_and_resumed, tmp_path):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert len(set(expected)) == 6
        assert resumed == losses[3:]
        assert stats["unique_graphs"] == 3


def compiled_models(run):
    """How many models a run compiles."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "compile_blocks", lambda model: calls.append(model))
        train_here(run)
    return len(calls)


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_compiles_where_it_is_asked_to(tmp_path, asked):
    run = {**write_inputs(tmp_path, ds_config(micro_batch=2)), "run_dir": str(tmp_path / "run"), "steps": 1}
    assert run_ranks(1, compiled_models, {**run, "compile": asked}) == [int(asked)]
