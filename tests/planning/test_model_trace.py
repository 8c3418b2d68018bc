"""What the planner asks of a model without values, compared with a model that computes, and with counts by hand."""

from dataclasses import replace

import pytest
import torch
from model_parts import PARTS, model_of
from operators import Operators
from torch import nn
from toy import recipe_of, shipped

from megamoe.config.model import load_preset
from megamoe.model import block as block_module
from megamoe.model import experts
from megamoe.model.costs import train_flops_per_token
from megamoe.model.decoder import Decoder
from megamoe.planning.model_trace import model_trace
from megamoe.planning.sharding import read_setup

BATCH, LENGTH = 2, 64


def setup_of(model, ep_size=1, on_cpu=False, dtype="bf16", length=LENGTH):
    ds = shipped("zero2" if dtype == "bf16" else "zero2_fp32") | {"train_micro_batch_size_per_gpu": BATCH}
    return read_setup(model, recipe_of(ds, ep_size), ep_size, length, on_cpu)


def operators(setup):
    """Of the last block, each way."""
    trace = list(model_trace(setup).blocks.values())[-1]
    return trace.work["forward"].operators, trace.work["backward"].operators


def flops(work):
    return sum(count * gemm.flops for gemm, count in work.gemms.items()) + work.attention


def computed(model):
    """Operators of a step in bf16 that computes: (forward, both passes)."""
    decoder = Decoder(model)
    for parameter in decoder.parameters():
        parameter.data = parameter.data.bfloat16()
    ids = torch.zeros(BATCH, LENGTH + model.num_nextn_predict_layers, dtype=torch.int64)
    counted = Operators()
    with counted:
        loss = decoder(ids[:, :LENGTH], ids)
    forward = counted.calls.total()
    with counted:
        loss.backward()
    return forward, counted.calls.total()


@pytest.mark.parametrize("part", PARTS)
def test_a_cpu_that_computes_is_given_the_operators_that_are_traced(part):
    # Every token goes to all experts that it may, and groups would choose among them.
    model = model_of(part, num_experts_per_tok=4 if "topk_group" in PARTS[part] else 8)
    trace = model_trace(setup_of(model, on_cpu=True))
    work = [part.work for part in (trace.around, *trace.blocks.values())]
    forward = sum(one["forward"].operators + one["head"].operators for one in work)
    backward = sum(one["backward"].operators for one in work)
    assert computed(model) == (forward, forward + backward)


@pytest.mark.parametrize(
    ("preset", "ep_size", "expected"),
    [
        ("moe-680m", 1, (50, 47)),
        ("moe-680m", 4, (92, 58)),
        ("qwen3-30b-a3b", 1, (54, 53)),
        ("qwen3-30b-a3b", 8, (96, 64)),
        ("moonlight-16b-a3b", 1, (68, 67)),
    ],
)
def test_a_gpu_is_given_as_many_operators_as_were_counted_by_hand(preset, ep_size, expected):
    assert operators(setup_of(load_preset(preset), ep_size)) == expected


@pytest.mark.parametrize("preset", ["moe-680m", "qwen3-30b-a3b", "olmoe-7b-a1b", "moonlight-16b-a3b", "tiny-glm"])
def test_gemms_and_attention_have_the_operations_that_a_models_costs_say(preset):
    model = load_preset(preset)
    setup = setup_of(model, length=256)
    trace = model_trace(setup)
    blocks, head = trace.blocks.values(), flops(trace.around.work["head"])  # with its gradients
    forward = sum(flops(block.work["forward"]) for block in blocks) + head / 3
    assert 3 * forward == pytest.approx(train_flops_per_token(model, 256) * setup.tokens, rel=0.01)
    backward = sum(flops(block.work["backward"]) for block in blocks) + head * 2 / 3
    assert 2 * forward < backward < 2.1 * forward  # attention has 2.5 times


def attention_of(setup):
    return [
        sum(block.work[phase].attention for block in model_trace(setup).blocks.values())
        for phase in ("forward", "backward")
    ]


@pytest.mark.parametrize("on_cpu", [False, True])
def test_attention_within_documents_counts_as_in_samples_as_short_and_a_gpus_window_as_what_it_shows(on_cpu):
    model = model_of("untied_multi_token", document_attention=True, head_dim=16)
    setup = setup_of(model, on_cpu=on_cpu, length=256)
    short = replace(setup, micro_batch=4 * BATCH, seq_len=64)
    assert attention_of(replace(setup, document_tokens=64)) == attention_of(short)
    assert attention_of(replace(setup, document_tokens=256)) == attention_of(setup)
    crossing = replace(setup, model=model.model_copy(update={"document_attention": False}))
    assert attention_of(replace(crossing, document_tokens=64)) == attention_of(setup)
    windows = replace(setup, model=model.model_copy(update={"sliding_window": 64}))
    shown = 2 * (64 - 64**2 / 512) / 256 if not on_cpu else 2  # of a mask, all positions
    assert attention_of(windows) == pytest.approx([flops * shown for flops in attention_of(setup)])


def test_a_loop_has_a_gemm_for_each_expert_and_waits_for_the_device():
    setup = setup_of(load_preset("tiny"), ep_size=2)
    plain, loop = (
        model_trace(one).blocks["layers.0"].work["forward"] for one in (setup, replace(setup, kernel="loop"))
    )
    assert flops(loop) == pytest.approx(flops(plain))
    assert (plain.waits, loop.waits) == (1, 3)
    assert loop.gemms.total() == plain.gemms.total() + 2 * 4 - 2


class Mixing(nn.Module):
    """A made-up attention: one GEMM, and a sum over the positions before."""

    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x, rotary, mask=None, cache=None):
        return self.proj(x).cumsum(1)


class Squared(experts.StackedExperts):
    """A made-up kind of expert: what lies between the GEMMs is squared."""

    def activate(self, projected):
        return projected * projected


def test_kinds_of_attention_and_experts_that_the_planner_has_never_heard_of_are_planned(monkeypatch):
    model = load_preset("tiny").model_copy(update={"expert_dropout": 0.0})
    setup = setup_of(model, length=128)
    plain = model_trace(setup).blocks["layers.0"]
    monkeypatch.setattr(block_module, "build_attention", lambda config, _: Mixing(config.hidden_size))
    monkeypatch.setattr(block_module, "StackedExperts", Squared)
    made_up = model_trace(setup_of(model.model_copy(update={"rms_norm_eps": 1e-4}), length=128)).blocks["layers.0"]
    tokens, hidden, heads = setup.tokens, model.hidden_size, model.num_attention_heads
    assert made_up.work["forward"].attention == 0
    assert [event.name for event in made_up.events["backward"]].count("self_attn.proj.weight") == 1
    # It keeps its input alone: no queries, keys, values and averages, and no sums of exponentials.
    width, positions = model.head_dim, tokens + BATCH * model.num_latent_tokens
    kept = 2 * positions * (hidden + width * (2 * heads + 2 * model.num_key_value_heads)) + 4 * positions * heads
    less = plain.events["forward"][-1].level.total() - made_up.events["forward"][-1].level.total()
    assert less == kept - 2 * tokens * hidden
