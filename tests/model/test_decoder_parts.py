"""What holds for a model of whatever parts, and what each part of a block and of the training loss computes."""

import math

import pytest
import torch
import torch.nn.functional as F
from model_parts import PARTS, model_of

from megamoe.model.attention import attend
from megamoe.model.decoder import Decoder
from megamoe.model.names import plain_parts
from megamoe.model.topology import ExpertTopology


def random_model(part, seed=0, **changes):
    """In float64, with weights large enough that every part tells, and a bias in every router that has one."""
    model = Decoder(model_of(part, **changes)).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1 if "norm" in name else 0, 0.3)
        for router in model.routers():
            if router.selection_bias is not None:
                router.selection_bias.normal_(0, 0.2)
    return model


def some_ids(rows, length):
    return torch.randint(101, (rows, length), generator=torch.Generator().manual_seed(length))


def close(one, other, atol=1e-10):
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


# --- whatever the parts ---


@pytest.mark.parametrize("part", PARTS)
def test_padded_rows_and_cached_calls_give_the_logits_of_the_row_alone(part):
    model = random_model(part).eval()
    ids = some_ids(2, 14)
    alone = model(ids[:1, 4:])[0]
    real = torch.ones(2, 14, dtype=torch.bool)
    real[0, :4] = False
    close(model(ids, attention_mask=real)[0, 4:], alone)
    cache = model.new_cache(14)
    steps = [
        model(ids[:, start:end], attention_mask=real[:, :end], cache=cache)
        for start, end in ((0, 9), (9, 10), (10, 14))
    ]
    close(torch.cat(steps, dim=1)[0, 4:], alone)


def plain_weights(config, topology=None):
    model = Decoder(config, 3, topology)
    return {
        one.name: weight.flatten()[one.start : one.start + one.count]
        for name, weight in model.named_parameters()
        for one in plain_parts(name, tuple(weight.shape), model.topology.first_expert)
    }


def test_initial_weights_are_the_same_for_every_ep_size():
    for part in PARTS:
        whole, seen = plain_weights(model_of(part)), set()
        for ep_size, rank in ((2, 0), (4, 2), (4, 3)):  # together they hold every expert
            for name, values in plain_weights(model_of(part), ExpertTopology(8, ep_size, ep_size, rank)).items():
                assert torch.equal(values, whole[name]), f"{part}: {name}"
                seen.add(name)
        assert seen == set(whole)


def test_initial_biases_are_zero_norms_are_one_and_the_other_weights_are_drawn():
    for part in ("head_norm_partial_rope", "full_norm_out_bias", "compressed_queries"):
        weights = dict(Decoder(model_of(part)).named_parameters())
        for name, weight in weights.items():
            if name.endswith(".bias"):
                assert torch.equal(weight, torch.zeros_like(weight)), name
            elif "norm" in name:
                assert torch.equal(weight, torch.ones_like(weight)), name
            else:
                assert weight.std() > 0.005, name
        assert any(name.endswith(".bias") for name in weights)


def test_recomputed_blocks_give_the_same_loss_and_gradients():
    ids, labels = some_ids(2, 10), some_ids(2, 11)
    for part in PARTS:
        results = []
        for recompute in (0, 2):
            model = random_model(part)
            model.recompute_blocks = recompute
            model(ids, labels[:, : 10 + model.config.num_nextn_predict_layers]).backward()
            results.append((model.step_losses.clone(), [weight.grad for weight in model.parameters()]))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_evaluation_gives_the_cross_entropy_alone_and_training_adds_the_parts_by_their_coefficients():
    for part in PARTS:
        model = random_model(part)
        ids, labels = some_ids(2, 10), some_ids(2, 10 + model.config.num_nextn_predict_layers)
        total = model(ids, labels)
        parts = dict(zip(model.loss_parts, model.step_losses.tolist(), strict=True))
        model.eval()
        loss = model(ids, labels[:, :10])
        close(loss, F.cross_entropy(model(ids).flatten(0, 1), labels[:, :10].flatten()))
        assert parts["cross_entropy"] == pytest.approx(loss.item(), abs=1e-6), part
        config, layers = model.config, len(model.config.sparse_blocks)
        weight = {
            "cross_entropy": 1,
            "mtp": config.mtp_loss_coef,
            "balance": layers * config.router_aux_loss_coef,
            "router_z": layers * config.router_z_loss_coef,
            "output_z": config.output_z_loss_coef,
        }
        expected = sum(weight[name] * value for name, value in parts.items())
        assert total.item() == pytest.approx(expected, rel=1e-6), part
        assert all(value > 0 for value in parts.values()), part


def test_losses_of_several_micro_batches_are_added_up():
    model = random_model("sequence_loss")
    first, second = ((some_ids(2, length), some_ids(2, length)) for length in (10, 12))
    model(*first)
    once = model.step_losses.clone()
    model.step_losses.zero_()
    model(*second)
    twice = model.step_losses + once
    model(*first)
    close(model.step_losses, twice, atol=1e-5)


# --- blocks ---


def block_input(model):
    torch.manual_seed(1)
    return torch.randn(2, 6, 32, dtype=torch.float64)


def silu_mlp(x, weights, prefix):
    up = x @ weights[f"{prefix}.up_proj.weight"].T
    gate = weights.get(f"{prefix}.gate_proj.weight")
    inside = F.silu(up) if gate is None else F.silu(x @ gate.T) * up
    return inside @ weights[f"{prefix}.down_proj.weight"].T


def norm(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def halves(model, block):
    """(x behind attention, what goes to the experts or the MLP, the block's output)."""
    x = block_input(model)
    rotary = model._rotary(torch.arange(6).unsqueeze(0), torch.tensor([6]), torch.float64, 0)
    middle = x + block.self_attn(block.input_layernorm(x), rotary)
    return middle, norm(middle, block.post_attention_layernorm.weight), block(x, rotary, None, None, None)[0]


@pytest.mark.parametrize("part", ["shared_experts", "gated_shared_experts"])
def test_every_token_passes_the_shared_experts_next_to_its_own(part):
    model = random_model(part).eval()
    block = model.layers[1]
    middle, rows, out = halves(model, block)
    weights = dict(block.named_parameters())
    shared = silu_mlp(rows, weights, "shared_mlp")
    if model.config.shared_expert_gate:
        shared = shared / (1 + torch.exp(-rows @ weights["shared_gate.weight"].T))
    close(out, middle + block.moe(rows)[0] + shared)


def test_a_dense_block_has_one_mlp_of_intermediate_size_and_the_others_have_experts():
    model = random_model("dense_layers", gated_mlp=True, moe_intermediate_size=16).eval()
    assert [hasattr(block, "moe") for block in model.layers] == [False, True, False]
    assert model.config.sparse_blocks == [1]
    assert len(model.routers()) == 1
    middle, rows, out = halves(model, model.layers[2])
    weights = dict(model.layers[2].named_parameters())
    assert weights["mlp.up_proj.weight"].shape == (48, 32)
    close(out, middle + silu_mlp(rows, weights, "mlp"))


def test_yarn_scales_the_scores_of_latent_attention_by_mscale_all_dim_squared():
    model, scales = random_model("yarn_latent_attention").eval(), []
    for block in model.layers:
        block.self_attn.attend = lambda *inputs: (scales.append(inputs[-1]), attend(*inputs))[1]
    model(some_ids(1, 5))
    assert scales == pytest.approx(3 * [12**-0.5 * (0.1 * 0.4 * math.log(4) + 1) ** 2])


# --- multi-token prediction ---


@pytest.mark.parametrize("part", ["untied_multi_token", "sliding_multi_token"])
def test_the_further_block_predicts_the_token_after_the_next_from_state_and_embedding(part):
    model = random_model(part)
    ids, labels = some_ids(2, 10), some_ids(2, 11)
    labels[0, -1] = -100
    model(ids, labels)
    measured = model.step_losses[model.loss_parts.index("mtp")]

    model.eval()
    states = []
    model.norm.register_forward_hook(lambda _, inputs, output: states.append(output))
    model(ids)
    weights = dict(model.named_parameters())
    embedded = weights["embed_tokens.weight"][labels[:, :10]]
    joined = torch.cat(
        (norm(embedded, weights["mtp.embed_norm.weight"]), norm(states[0], weights["mtp.hidden_norm.weight"])), -1
    )
    rotary = model._rotary(torch.arange(10).unsqueeze(0), torch.tensor([10]), torch.float64, 0)
    before = torch.arange(10).unsqueeze(1) - torch.arange(10)  # positions between a query and a key
    seen = (before >= 0) & (before < (model.config.sliding_window or 10))
    x = model.mtp.block(joined @ weights["mtp.proj.weight"].T, rotary, seen[None, None], None, None)[0]
    logits = norm(x, weights["mtp.norm.weight"]) @ model.head.T
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    assert measured.item() == pytest.approx(expected.item(), abs=1e-5)


def test_padding_is_routed_by_no_block():
    model = random_model("untied_multi_token")
    real = torch.ones(2, 10, dtype=torch.bool)
    real[0, :6] = False
    model(some_ids(2, 10), some_ids(2, 11), attention_mask=real)
    assert [router.step_counts.sum().item() for router in model.routers()] == [2 * 14] * 4


def test_labels_of_another_width_are_refused():
    for part, needed in (("untied_multi_token", 11), ("sequence_loss", 10), ("latent_tokens", 10)):
        model = random_model(part)
        for width in {9, 10, 11} - {needed}:
            with pytest.raises(ValueError, match=f"labels are {width} per row for 10 ids; give {needed}"):
                model(some_ids(2, 10), some_ids(2, width))
        with pytest.raises(ValueError, match="give 10"):
            model.eval()(some_ids(2, 10), some_ids(2, 11))


@pytest.mark.parametrize("part", ["untied_multi_token", "sliding_multi_token"])
def test_padding_does_not_change_the_losses_of_a_row(part):
    ids, labels = some_ids(1, 14), some_ids(1, 15)
    labels[:, :5] = -100  # or the last padded position would predict the token after the first real one
    padded, alone = random_model(part), random_model(part)
    padded(ids, labels, torch.arange(14).unsqueeze(0) >= 4)
    alone(ids[:, 4:], labels[:, 4:])
    assert padded.step_losses.tolist() == pytest.approx(alone.step_losses.tolist(), rel=1e-6)


def test_multi_token_prediction_changes_no_logit():
    model = random_model("untied_multi_token").eval()
    without = Decoder(model.config.model_copy(update={"num_nextn_predict_layers": 0})).double().eval()
    without.load_state_dict({name: one for name, one in model.state_dict().items() if not name.startswith("mtp.")})
    ids = some_ids(2, 9)
    assert torch.equal(model(ids), without(ids))


# --- head ---


def test_an_untied_head_has_weights_of_its_own():
    model = random_model("untied_multi_token").eval()
    ids = some_ids(1, 5)
    before = model(ids)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    close(model(ids), 2 * before)
