"""Compiled blocks: what eager ones compute, in few kernels, compiled once.

Kernels are built for one model; where it is the regions that matter, they are traced and run by torch's operators.
"""

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from devices import SHARES
from engines import save
from model_parts import PARTS, with_fp32_statistics
from operators import Operators, traced
from ranks import run_new_ranks, run_ranks
from torch._dynamo.utils import counters
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.nn.attention import varlen
from toy import PRESET, ds_config, recipe_of, train_here, write_inputs

from megamoe.checkpoint.restore import restore_first_verified
from megamoe.config.model import ModelConfig, load_preset
from megamoe.data.batches import Batch
from megamoe.data.document_bounds import Documents
from megamoe.model import decoder as model_decoder
from megamoe.model import dispatch
from megamoe.model.compiled import compile_region
from megamoe.model.decoder import Decoder
from megamoe.model.generation import generate
from megamoe.training.step import balancer_of, build_train_step

CONFIG = load_preset("tiny").model_copy(
    update={"num_hidden_layers": 3, "expert_dropout": 0.05, "router_jitter_noise": 0.3}
)
BATCH, LENGTH, STEPS = 2, 16, 4


def decoder(dtype, **changes):
    return with_fp32_statistics(Decoder(CONFIG.model_copy(update=changes)).to(dtype))


def prepared(model, step, spread=0.05):
    """Random tokens, and biases and seeds that depend on the step; so does the routing, then."""
    generator = torch.Generator().manual_seed(step)
    for router in model.routers():
        router.selection_bias.normal_(0, spread, generator=generator)
    torch.manual_seed(step)  # of dropout and jitter
    model.zero_grad()
    return torch.randint(CONFIG.vocab_size, (BATCH, LENGTH), generator=generator)


def training_pass(model, step, spread=0.05, documents=None):
    """(parts of the loss, gradients in one vector, slots, margins)."""
    ids = prepared(model, step, spread)
    labels = torch.cat((ids, ids[:, :1]), dim=1)[:, : LENGTH + model.config.num_nextn_predict_layers]
    model.step_losses.zero_()
    model(ids, labels, documents=documents).backward()
    gradients = torch.cat([weight.grad.flatten().double() for weight in model.parameters()])
    balancer = balancer_of(model)
    return model.step_losses.clone(), gradients, balancer.take_counts(), balancer.take_margins()


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


def operators_of_a_pass(layers):
    """Those of a compiled model, outside of its kernels."""
    model = decoder(torch.bfloat16, num_hidden_layers=layers)
    model.compile_blocks()
    training_pass(model, 0)  # compiles
    ids = prepared(model, 1)
    with RunOperators() as operators:
        model(ids, ids).backward()
    return operators.calls


def test_a_model_in_bf16_is_the_eager_one_to_rounding_in_few_kernels_by_one_compilation_of_three_regions(monkeypatch):
    monkeypatch.setattr(dispatch, "CPU_ROW_MULTIPLE", 1)  # a GPU's rows have no fill
    with Kernels() as kernels:
        outside: Counter = operators_of_a_pass(3) - operators_of_a_pass(2)
        eager, ours = decoder(torch.bfloat16), decoder(torch.bfloat16)
        ours.compile_blocks()
        ours.recompute_blocks = 1
        routings = set()
        for step in range(STEPS):
            # So far apart that rounding sends no token to another expert.
            losses, gradients, slots, _ = training_pass(ours, step, spread=0.5)
            expected = training_pass(eager, step, spread=0.5)
            torch.testing.assert_close(losses, expected[0], rtol=1e-3, atol=0)
            assert torch.equal(slots, expected[2])
            assert (gradients - expected[1]).norm() < SHARES[torch.bfloat16] * expected[1].norm()
            routings.add(tuple(slots.flatten().tolist()))
    assert len(routings) == STEPS
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    outside.pop("empty")  # which is no kernel
    assert outside["_grouped_mm"] == 6
    assert outside.total() + sum(kernels.graphs) <= 76  # 4 of the loss, of a whole model


def test_evaluation_and_generation_are_eager():
    def refuse(*_):
        raise AssertionError("compiled")

    model = decoder(torch.float32)
    ids = torch.arange(12).view(2, 6)
    for block in model.layers:
        block.compiled = refuse
    with pytest.raises(AssertionError, match="compiled"):
        model(ids, ids)
    model.eval()(ids, ids)
    generate(model, [[1, 2, 3]], 2)


MIXED = PARTS["head_norm_partial_rope"] | PARTS["gated_shared_experts"] | PARTS["sigmoid_groups"]
MIXED |= PARTS["sequence_loss"] | PARTS["untied_multi_token"]
MIXED |= {"num_latent_tokens": 0, "first_k_dense_replace": 1, "sliding_window": 5, "gated_mlp": True}
COMPRESSED = PARTS["compressed_queries"] | PARTS["quantile_bias"] | PARTS["global_loss"]
COMPRESSED |= {"num_latent_tokens": 0, "num_nextn_predict_layers": 1}


@pytest.mark.parametrize(
    ("parts", "graphs"), [(MIXED, 6), (COMPRESSED, 3)], ids=["mixed", "latent_attention, quantile"]
)
def test_blocks_of_every_part_and_any_routing_give_the_losses_and_gradients_of_eager_ones(parts, graphs, monkeypatch):
    monkeypatch.setattr(dispatch, "CPU_ROW_MULTIPLE", 4)  # so that the fill changes with the routing
    eager, ours = decoder(torch.float32, **parts), decoder(torch.float32, **parts)
    with traced():
        ours.compile_blocks()
    routings = set()
    for step in range(STEPS):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            losses, gradients, slots, margins = training_pass(ours, step)
        expected = training_pass(eager, step)
        torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=0)
        assert (gradients - expected[1]).norm() < 1e-5 * expected[1].norm()
        assert torch.equal(slots, expected[2])
        assert margins.sum() == expected[3].sum()  # a margin may be rounded into the next bin
        assert (margins - expected[3]).abs().sum() <= 0.01 * margins.sum()
        routings.add(tuple(slots.flatten().tolist()))
    assert len(routings) == STEPS
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def give_the_cpu_a_kernel():
    """torch's operator of sequences of varying lengths computes something here, eager or compiled."""
    varlen._varlen_attn.register_kernel("cpu")(
        lambda query, key, *_: (
            query * 2,
            key.new_zeros(query.shape[1], len(query)),
            torch.zeros(2, dtype=torch.uint64),
        )
    )
    varlen._varlen_attn_backward.register_kernel("cpu")(
        lambda grad, query, key, value, *_: (grad * 2, key * 0.01, value * 0.02)
    )


@pytest.mark.parametrize("is_one_call", [False, True])
def test_rows_of_any_documents_and_padding_are_compiled_once_and_give_the_results_of_eager_ones(
    is_one_call, monkeypatch
):
    monkeypatch.setattr(model_decoder, "takes_lengths", lambda *_: is_one_call)
    give_the_cpu_a_kernel()
    parts = PARTS["sequence_loss"] | {"num_nextn_predict_layers": 1, "num_hidden_layers": 1}
    eager, ours = decoder(torch.float32, **parts), decoder(torch.float32, **parts)
    with traced():
        ours.compile_blocks()
    draw = np.random.default_rng(0)
    for step in range(STEPS):
        lengths = [LENGTH, LENGTH - 1 - step]
        starts = [np.flatnonzero(draw.random(length) < 0.2)[1:] for length in lengths]
        documents = Documents.of(starts, lengths, LENGTH)
        with torch._dynamo.config.patch(error_on_recompile=step > is_one_call):  # once more for another longest one
            losses, gradients, slots, _ = training_pass(ours, step, documents=documents)
        expected = training_pass(eager, step, documents=documents)
        torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=0)
        assert (gradients - expected[1]).norm() < 1e-5 * expected[1].norm()
        assert torch.equal(slots, expected[2])
        assert slots.sum(1).eq(sum(lengths) * ours.config.num_experts_per_tok).all()
    assert not counters["graph_break"]


def test_windows_documents_and_padding_with_other_lengths_of_samples_are_within_the_limit_of_the_compiler(monkeypatch):
    monkeypatch.setattr(model_decoder, "takes_lengths", lambda *_: True)
    give_the_cpu_a_kernel()
    parts = {"num_latent_tokens": 0, "num_hidden_layers": 2, "sliding_window": 5}
    model = decoder(torch.float32, **parts, layer_types=["sliding_attention", "full_attention"])
    with traced("eager"):
        model.compile_blocks()

    def run():
        for length in (LENGTH, 12):
            for starts, tokens in (([4], length), ([9], length - 1), ([], length)):
                ids = torch.arange(length).unsqueeze(0)
                model(ids, ids, documents=Documents.of([np.array(starts, int)], [tokens], length))

    ThreadPoolExecutor(1).submit(run).result()  # settings of torch are a thread's; on a GPU another one recomputes
    assert 9 < counters["stats"]["unique_graphs"] < 30


def test_the_weighted_sum_where_the_experts_are_goes_backward_in_one_kernel(monkeypatch):
    torch.manual_seed(0)
    slots = torch.tensor([1, 3, 2, 1, 2] * 8)  # of each row
    expert = torch.randint(4, (int(slots.sum()),))
    layout = dispatch.lay_out(expert, expert.bincount(minlength=4))
    place, starts = layout.place, slots.cumsum(0) - slots
    row = torch.repeat_interleave(torch.arange(len(slots)), slots).index_select(0, layout.row)
    results, weights = torch.randn(len(row), 16, requires_grad=True), torch.rand(len(row), requires_grad=True)
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    combine = compile_region(dispatch.combine_rows, 0, 1, 2, 3, 4)
    found, codes = run_fw_bw_and_get_code(lambda: combine(results, weights, row, place, starts))
    assert [len(re.findall(r"^ +cpp_fused\w+\(", code, re.M)) for code in codes] == [1, 1]  # forward: places' weights
    got = results.grad, weights.grad
    weight_at = torch.zeros(len(row)).index_copy(0, place, weights)
    sums = torch.zeros(len(slots), 16).index_add(0, row, results * weight_at[:, None])
    torch.testing.assert_close(found, sums)
    torch.testing.assert_close(got, torch.autograd.grad(sums.sum(), (results, weights)))


# --- in the engine --------------------------------------------------------------------------------------------------

EXPERTS = {"gated_mlp": True, "expert_dropout": 0.1, "router_jitter_noise": 0.01}


def train_step_of(compiled_blocks):
    ds = ds_config(micro_batch=2, accumulation=2)
    config = ModelConfig(**{**PRESET, **EXPERTS})
    blocks = {"recompute_blocks": 1, "recompute": "selective"} if compiled_blocks else {}
    return build_train_step(config, recipe_of(ds), ep_size=2, compiled=compiled_blocks, **blocks)


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


@traced()
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
        assert stats["unique_graphs"] == 4  # three of a block, between which rows are exchanged, and of the losses


def compiled_models(runs):
    """How many models each run compiles."""
    counts = []
    for run in runs:
        with mock.patch.object(Decoder, "compile_blocks") as compile_blocks:
            train_here(run)
        counts.append(compile_blocks.call_count)
    return counts


def test_a_run_compiles_where_it_is_asked_to(tmp_path):
    run = {**write_inputs(tmp_path, ds_config(micro_batch=2)), "steps": 1}
    runs = [{**run, "run_dir": str(tmp_path / f"compile_{asked}"), "compile": asked} for asked in (False, True)]
    assert run_ranks(1, compiled_models, runs) == [[0, 1]]
