"""What one layer costs, counted: operators and bytes; the shape that a GPU wants, held without one."""

import functools

import pytest
import torch
from fake_gpu import join_fake_ranks
from model_parts import PARTS, SHAPE, model_of, with_fp32_statistics
from operators import NewTensors, Operators, rms_norm_as_one_operator
from ranks import run_alone
from torch import nn

from megamoe.config.model import ModelConfig, load_preset
from megamoe.model import dispatch
from megamoe.model.decoder import Decoder
from megamoe.model.topology import ExpertTopology

FULL = {"expert_dropout": 0.05, "router_jitter_noise": 0.01}  # what moe-680m has
TINY = load_preset("tiny").model_copy(update=FULL)
BATCH = 2


@pytest.fixture(autouse=True)
def little_fill(monkeypatch):
    """The operators are the same for any multiple above 1."""
    monkeypatch.setattr(dispatch, "CPU_ROW_MULTIPLE", 2)


def step_of(config, ep_size=1, length=16):
    """The counts of a forward and backward pass of the whole model in bf16."""
    model = Decoder(config, None, ExpertTopology(config.num_local_experts, ep_size, ep_size)).bfloat16()
    torch.manual_seed(0)
    for weight in model.parameters():
        nn.init.normal_(weight, 0, 0.02)
    with_fp32_statistics(model)
    for moe in model.moe_layers() if ep_size > 1 else ():
        moe.set_deepspeed_parallelism()
    ids = torch.randint(config.vocab_size, (BATCH, length))
    labels = torch.randint(config.vocab_size, (BATCH, length + config.num_nextn_predict_layers))
    operators = Operators()
    plain = nn.RMSNorm.forward
    nn.RMSNorm.forward = rms_norm_as_one_operator(operators)
    try:
        with operators:
            model(ids, labels).backward()
    finally:
        nn.RMSNorm.forward = plain
    return operators


def layer_of(config, **options):
    """(operators by name, bytes) of one layer more."""
    two, three = (step_of(config.model_copy(update={"num_hidden_layers": n}), **options) for n in (2, 3))
    return three.calls - two.calls, three.bytes - two.bytes


GATED = {"gated_mlp": True, "router_score": "sigmoid"}


def test_a_layer_has_at_most_so_many_operators_whatever_the_number_of_experts():
    for parts, experts, most in (({}, 8, 120), ({}, 256, 120), (GATED, 256, 130)):
        calls, _ = layer_of(TINY.model_copy(update={**parts, "num_local_experts": experts}))
        assert calls["_grouped_mm"] == 6
        assert sum(calls.values()) <= most, (experts, calls)


def layers_among_peers(ep_size, configs):
    """Operators of each, as `layer_of`, as one of `ep_size` ranks whose collectives move nothing."""
    join_fake_ranks(ep_size)
    dispatch.CPU_ROW_MULTIPLE = 2
    return [layer_of(config, ep_size=ep_size)[0] for config in configs]


def test_expert_parallelism_adds_at_most_so_many():
    kinds = [({}, 8, 170), ({}, 256, 170), (GATED, 256, 175)]
    configs = [TINY.model_copy(update={**parts, "num_local_experts": experts}) for parts, experts, _ in kinds]
    for calls, (_, experts, most) in zip(run_alone(layers_among_peers, 4, configs), kinds, strict=True):
        assert calls["alltoall_base_"] == 7  # counts; weights, rows there and back; their gradients
        assert sum(calls.values()) <= most, (experts, calls)


# Operators that a part adds to a layer, both ways.
MORE = {
    "latent_tokens": 2,
    "gated_narrow_experts": 4,
    "shared_experts": 21,  # gated, as the routed ones
    "gated_shared_experts": 20,
    "dense_layers": 0,
    "sigmoid_groups": 10,
    "quantile_bias": 8,
    "plain_scores": 0,
    "sequence_loss": 27,  # and a z-loss
    "global_loss": 13,  # of sigmoid scores
    "head_norm_partial_rope": 9,
    "full_norm_out_bias": 5,
    "sliding": 5,
    "sliding_multi_token": 5,
    "latent_attention": 9,
    "yarn_latent_attention": 9,
    "compressed_queries": 16,  # with biases
    "untied_multi_token": 14,  # a z-loss
}


@functools.cache
def operators_of_the_plain_layer():
    return layer_of(ModelConfig(**SHAPE, **FULL))[0].total()


@pytest.mark.parametrize("part", PARTS)
def test_a_part_adds_at_most_so_many_operators_to_a_layer(part):
    plain = operators_of_the_plain_layer()
    calls, _ = layer_of(model_of(part, **FULL))
    assert plain <= 120
    assert calls.total() <= plain + MORE[part], calls


@pytest.mark.parametrize("experts", [8, 64])
def test_the_bytes_that_a_token_moves_are_so_many_passes_over_its_rows(experts, monkeypatch):
    monkeypatch.setattr(dispatch, "CPU_ROW_MULTIPLE", 1)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    # Without latent tokens, whose rows are not those of a token.
    shape |= {"head_dim": 32, "num_latent_tokens": 0, "num_local_experts": experts}
    config = TINY.model_copy(update=shape)
    top_k, hidden = config.num_experts_per_tok, config.hidden_size
    # Each reading and each writing of a row in bf16 is 2 bytes per number (docs/results/performance.md has the sum).
    most = 2 * (
        84 * hidden  # the residual stream: two norms, the router in fp32, projections, residual sums
        + 36 * top_k * hidden  # gathered, dropped out, combined
        + 11 * top_k * config.intermediate_size  # inside the experts
        + 26 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
        + 34 * experts + 140 * top_k  # the router's scores and their entropy, indices
    )  # fmt: skip
    short, long = (layer_of(config, length=length)[1] for length in (16, 48))
    assert 0.95 * most < (long - short) / 32 / BATCH <= most


def test_no_parameter_is_stacked_concatenated_or_copied():
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_local_experts": 16}
    config = TINY.model_copy(update={**GATED, **shape})
    smallest = 16 * 64 * 128  # of a layer's stacked parameters; every activation is far smaller
    model = Decoder(config).bfloat16()
    ids = torch.randint(config.vocab_size, (BATCH, 16))

    with NewTensors() as tensors:
        model(ids, ids).backward()
    large = [name for name, numel in tensors.made if numel >= smallest]
    gradients = 2 * config.num_hidden_layers  # one for each stacked parameter, and nothing else of that size
    assert large == ["aten::_grouped_mm"] * gradients
