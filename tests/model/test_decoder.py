"""The decoder against a plain one, what holds for a model of whatever parts, and its loss."""

import itertools
import math

import formulas
import pytest
import torch
import torch.nn.functional as F
from devices import close
from exported import random_decoder
from formulas import normed
from model_parts import PARTS, model_of

from megamoe.model.decoder import Decoder
from megamoe.model.names import plain_parts
from megamoe.model.topology import ExpertTopology
from megamoe.planning.meter import LiveBytes


def random_model(part, **changes):
    """In float64, with weights large enough that every part tells, and a bias in every router that has one."""
    return random_decoder(model_of(part, **changes), std=0.3).double().train()


def some_ids(rows, length):
    return torch.randint(101, (rows, length), generator=torch.Generator().manual_seed(length))


# --- the whole decoder, and blocks ----------------------------------------------------------------------------------


def plain_decoder(ids, weights, biases, config):
    """Logits (T, V) of one row of token ids."""
    x = weights["embed_tokens.weight"][ids]
    for layer, bias in enumerate(biases):
        own = {name.removeprefix(f"layers.{layer}."): weight for name, weight in weights.items()}
        inner = {name.removeprefix("self_attn."): weight for name, weight in own.items()}
        rows, real = normed(x, own["input_layernorm.weight"]), torch.ones(1, len(ids), dtype=torch.bool)
        x = x + formulas.attention(inner, rows.unsqueeze(0), real, config.head_dim, theta=config.rope_theta)[0]
        names = ("router.weight", "experts.up", "experts.down")
        experts = [own[f"moe.deepspeed_moe.{name}"] for name in names]
        x = x + formulas.expert_layer(normed(x, own["post_attention_layernorm.weight"]), *experts, bias.tolist(), 2)[0]
    return normed(x, weights["norm.weight"]) @ weights["embed_tokens.weight"].T


def test_logits_and_all_gradients_are_those_of_a_plain_decoder():
    model = random_model("latent_tokens")
    ids, labels = some_ids(2, 7), some_ids(7, 2).T
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    biases = [router.selection_bias for router in model.routers()]
    expected = torch.stack([plain_decoder(row, weights, biases, model.config) for row in ids])
    expected_loss = -expected.softmax(-1).flatten(0, 1)[torch.arange(14), labels.flatten()].log().mean()
    expected_loss.backward()

    close(model(ids), expected, 1e-4)  # the model's angles are in fp32
    loss = model(ids, labels)
    loss.backward()
    close(loss, expected_loss, 1e-5)
    for name, weight in model.named_parameters():
        plain = weights[name].grad
        assert plain.abs().max() > 0
        torch.testing.assert_close(weight.grad, plain, rtol=1e-4, atol=1e-6)


def silu_mlp(x, weights, prefix):
    up = x @ weights[f"{prefix}.up_proj.weight"].T
    gate = weights.get(f"{prefix}.gate_proj.weight")
    inside = F.silu(up) if gate is None else F.silu(x @ gate.T) * up
    return inside @ weights[f"{prefix}.down_proj.weight"].T


@pytest.mark.parametrize("part", ["shared_experts", "gated_shared_experts", "dense_layers"])
def test_every_token_passes_the_shared_experts_next_to_its_own_or_one_dense_mlp(part):
    model = random_model(part, gated_mlp=True).eval()
    block = model.layers[2]
    x = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rotary = model._rotary(torch.arange(6).unsqueeze(0), torch.tensor([6]), torch.float64, 0)
    x = x + block.self_attn(block.input_layernorm(x), rotary)
    rows, weights = normed(x, block.post_attention_layernorm.weight), dict(block.named_parameters())
    if part == "dense_layers":
        assert [hasattr(block, "moe") for block in model.layers] == [False, True, False]
        added = silu_mlp(rows, weights, "mlp")
    else:
        shared = silu_mlp(rows, weights, "shared_mlp")
        if part == "gated_shared_experts":
            shared = shared / (1 + torch.exp(-rows @ weights["shared_gate.weight"].T))
        added = block.moe(rows)[0] + shared
    block.self_attn.forward = lambda *_: 0
    close(block(x, rotary, None, None, None)[0], x + added)


# --- padding and cache ----------------------------------------------------------------------------------------------


def padded(rows, side):
    """Rows of ids and their mask, filled up with token 7 on the given side."""
    longest = max(map(len, rows))
    ids, real = torch.full((len(rows), longest), 7), torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[number, place], real[number, place] = row, True
    return ids, real


def cached_logits(model, ids, steps, real):
    """Logits of `ids` (B, S) fed in `steps` parts through a cache of exactly S tokens."""
    cache = model.new_cache(ids.shape[1])
    parts, end = [], 0
    for step in steps:
        mask = None if real is None else real[:, : end + step]
        parts.append(model(ids[:, end : end + step], attention_mask=mask, cache=cache))
        end += step
    return torch.cat(parts, dim=1)


STEPS = [[5, *[1] * 9], [4, 6, 1, 3], [1] * 14, [14]]
KINDS = {part: (part, {}) for part in PARTS} | {
    "dynamic": (
        "latent_tokens",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    ),
    "yarn": ("latent_tokens", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2}}),
    "one latent, interleaved": ("latent_tokens", {"num_latent_tokens": 1, "rope_interleaved": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_padded_on_either_side_or_fed_in_pieces_gives_the_logits_it_gives_alone(kind):
    part, changes = KINDS[kind]
    model = random_model(part, **changes).eval()
    rows = [some_ids(1, length)[0] for length in (3, 9, 1, 14)]
    alone = [model(row.unsqueeze(0))[0] for row in rows]
    for side in ("left", "right"):
        ids, real = padded(rows, side)
        for logits, mask, expected in zip(model(ids, attention_mask=real), real, alone, strict=True):
            close(logits[mask], expected)
    ids, real = padded(rows[1::2], "left")
    for steps in STEPS:
        for logits, mask, expected in zip(cached_logits(model, ids, steps, real), real, alone[1::2], strict=True):
            close(logits[mask], expected)
        close(cached_logits(model, rows[-1].unsqueeze(0), steps, None)[0], alone[-1])


@pytest.mark.parametrize("part", ["latent_tokens", "untied_multi_token", "sliding_multi_token"])
def test_padding_adds_nothing_to_sums_of_losses_and_gradients_and_is_routed_by_no_block(part):
    results = []
    for first in (0, 4):
        model = random_model(part)
        ids, labels = some_ids(1, 14)[:, first:], some_ids(1, 14 + model.config.num_nextn_predict_layers)[:, first:]
        labels[:, : 5 - first] = -100  # or the last padded position would predict the token after the first real one
        model(ids, labels, None if first else torch.arange(14).unsqueeze(0) >= 4).backward()
        counts = [router.step_counts.tolist() for router in model.routers()]
        size = 14 - first  # positions, which training divides by
        results.append((model.step_losses * size, [weight.grad * size for weight in model.parameters()], counts))
    (losses, gradients, counts), (other_losses, others, other_counts) = results
    close(losses, other_losses, 1e-4)
    close(gradients, others)
    assert counts == other_counts


# --- initial weights ------------------------------------------------------------------------------------------------


def plain_weights(config, seed=3, topology=None):
    """The plain parameters by name."""
    model = Decoder(config, seed, topology)
    return {
        one.name: weight.detach().flatten()[one.start : one.start + one.count]
        for name, weight in model.named_parameters()
        for one in plain_parts(name, tuple(weight.shape), model.topology.first_expert)
    }


def test_initial_weights_are_the_same_for_every_ep_size_and_follow_from_the_seed():
    for part in PARTS:
        whole, seen = plain_weights(model_of(part)), set()
        for ep_size, rank in ((2, 0), (4, 2), (4, 3)):  # together they hold every expert
            here = plain_weights(model_of(part), topology=ExpertTopology(8, ep_size, ep_size, rank))
            for name, values in here.items():
                assert torch.equal(values, whole[name]), f"{part}: {name}"
                seen.add(name)
        assert seen == set(whole)
    other = plain_weights(model_of(part), seed=4)
    assert all("norm" in name or not torch.equal(one, other[name]) for name, one in whole.items())


RESIDUAL = ("self_attn.o_proj.weight", "down_proj.weight")


def test_no_two_initial_weights_come_from_the_same_stream():
    config, first = model_of("gated_narrow_experts", num_latent_tokens=2), {}
    for name, weight in plain_weights(config).items():
        if "norm" not in name:
            scale = math.sqrt(2 * config.num_hidden_layers) if name.endswith(RESIDUAL) else 1
            draw = tuple(round(value * scale, 6) for value in weight[:8].tolist())
            assert draw not in first, f"{name} starts like {first[draw]}"
            first[draw] = name


def test_residual_projections_start_smaller_by_the_root_of_twice_the_layers_norms_at_1_and_biases_at_0():
    shape = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 8, "head_dim": 32}
    config = model_of("head_norm_partial_rope", **shape, num_latent_tokens=64, initializer_range=0.05)
    residual = 0
    for name, weight in plain_weights(config).items():
        if "norm" in name or name.endswith(".bias"):
            assert (weight == (1 if "norm" in name else 0)).all(), name
            continue
        residual += name.endswith(RESIDUAL)
        std = 0.05 / 4 if name.endswith(RESIDUAL) else 0.05
        errors = 5 / math.sqrt(weight.numel())  # five standard errors
        assert weight.std().item() == pytest.approx(std, rel=errors / math.sqrt(2)), name
        assert abs(weight.mean().item()) < errors * std, name
    assert residual == 8 * (1 + config.num_local_experts)


def test_no_saved_name_of_a_router_contains_expert():
    names = [name for name in Decoder(model_of("latent_tokens")).state_dict() if ".router." in name]
    assert len(names) == 3 * 3  # weight, bias and running load
    assert not any("expert" in name for name in names)


# --- activation checkpointing ---------------------------------------------------------------------------------------


def step_of(part, recompute_blocks, recompute):
    """(losses, gradients, slots and margins counted, bytes kept for backward) of a model with dropout and jitter."""
    model = random_model(part, expert_dropout=0.3, router_jitter_noise=0.2)
    model.recompute_blocks, model.recompute = recompute_blocks, recompute
    torch.manual_seed(5)
    with LiveBytes() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.ignore(tensor)
        loss = model(some_ids(2, 10), some_ids(2, 10 + model.config.num_nextn_predict_layers))
        size = live.now
    loss.backward()
    counts = [(router.step_counts, router.step_margins) for router in model.routers()]
    return (model.step_losses, [weight.grad for weight in model.parameters()], counts), size


@pytest.mark.parametrize("part", PARTS)
def test_recomputed_activations_give_the_same_losses_gradients_and_counts_to_the_bit_from_less_memory(part):
    cases = (0, "whole"), (1, "selective"), (3, "selective"), (3, "whole")
    (stored, most), *recomputed = [step_of(part, *case) for case in cases]
    for found, _ in recomputed:
        torch.testing.assert_close(found, stored, rtol=0, atol=0)
    assert all(fewer < 0.96 * more for more, fewer in itertools.pairwise([most, *(size for _, size in recomputed)]))


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_evaluation_gives_the_cross_entropy_alone_and_training_adds_the_parts_by_their_coefficients(part):
    model = random_model(part)
    ids, labels = some_ids(2, 10), some_ids(2, 10 + model.config.num_nextn_predict_layers)
    total = model(ids, labels)
    parts = dict(zip(model.loss_parts, model.step_losses[:, 0].tolist(), strict=True))
    model(ids, labels)
    assert model.step_losses[:, 0].tolist() == pytest.approx([2 * value for value in parts.values()])
    assert model.step_losses[:, 1].eq(2).all()
    model.eval()
    loss = model(ids, labels[:, :10])
    close(loss, F.cross_entropy(model(ids).flatten(0, 1), labels[:, :10].flatten()))
    assert parts["cross_entropy"] == pytest.approx(loss.item(), abs=1e-6)
    config, layers = model.config, len(model.config.sparse_blocks)
    coefficients = {
        "cross_entropy": 1,
        "mtp": config.mtp_loss_coef,
        "balance": layers * config.router_aux_loss_coef,
        "router_z": layers * config.router_z_loss_coef,
        "output_z": config.output_z_loss_coef,
    }
    expected = sum(coefficients[name] * value for name, value in parts.items())
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert all(value > 0 for value in parts.values())


@pytest.mark.parametrize("part", ["untied_multi_token", "sliding_multi_token"])
def test_the_further_block_predicts_the_token_after_the_next_from_state_and_embedding(part):
    model = random_model(part)
    ids, labels = some_ids(2, 10), some_ids(2, 11)
    labels[0, -1] = -100
    model(ids, labels)
    measured = model.step_losses[model.loss_parts.index("mtp"), 0]

    model.eval()
    states = []
    model.norm.register_forward_hook(lambda _, inputs, output: states.append(output))
    model(ids)
    weights = dict(model.named_parameters())
    embedded = weights["embed_tokens.weight"][labels[:, :10]]
    pair = normed(embedded, weights["mtp.embed_norm.weight"]), normed(states[0], weights["mtp.hidden_norm.weight"])
    rotary = model._rotary(torch.arange(10).unsqueeze(0), torch.tensor([10]), torch.float64, 0)
    before = torch.arange(10).unsqueeze(1) - torch.arange(10)  # positions between a query and a key
    seen = (before >= 0) & (before < (model.config.sliding_window or 10))
    x = model.mtp.block(torch.cat(pair, -1) @ weights["mtp.proj.weight"].T, rotary, seen[None, None], None, None)[0]
    logits = normed(x, weights["mtp.norm.weight"]) @ model.head.T
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / 20
    assert measured.item() == pytest.approx(expected.item(), abs=1e-5)


def test_labels_of_another_width_are_refused():
    for part, needed in (("untied_multi_token", 11), ("sequence_loss", 10), ("latent_tokens", 10)):
        model = random_model(part)
        for width in {9, 10, 11} - {needed}:
            with pytest.raises(ValueError, match=f"labels are {width} per row for 10 ids; give {needed}"):
                model(some_ids(2, 10), some_ids(2, width))
        with pytest.raises(ValueError, match="give 10"):
            model.eval()(some_ids(2, 10), some_ids(2, 11))
