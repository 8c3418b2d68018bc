import itertools
import math

import pytest
import torch

import megamoe.model.decoder
from megamoe.config.model import ModelConfig
from megamoe.model.decoder import Decoder
from megamoe.model.names import plain_parts

# With theta 2^16 and 8 dimensions the frequencies 1, 2^-4, 2^-8, 2^-12 are exact, so fp32 angles are too.
THETA, HEAD_DIM = 65536.0, 8
SMALL = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    num_latent_tokens=3,
    max_position_embeddings=12,
    rope_theta=THETA,
    num_local_experts=4,
    num_experts_per_tok=2,
)
SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8},
]  # fmt: skip


def small_model(seed=0, **changes):
    """A small decoder in float64 with weights large enough that every part tells, and a bias in every router."""
    model = Decoder(SMALL.model_copy(update=changes)).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1 if "norm" in name else 0, 0.3)
        for router in model.routers():
            router.selection_bias.normal_(0, 0.2)
    return model


def some_ids(*shape):
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(one, other, atol=1e-10):
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


# --- the whole decoder against a plain one --------------------------------------------------------------------------


def plain_norm(x, weight):
    return weight * x / torch.sqrt((x * x).mean() + SMALL.rms_norm_eps)


def plain_rotate(x, position):
    """Pairs (i, i + half) turn by position * theta^(-2i / d); cosines and sines are fp32 numbers."""
    half = len(x) // 2
    angles = torch.tensor([position * THETA ** (-2 * i / len(x)) for i in range(half)], dtype=torch.float32)
    cos, sin = angles.cos().double(), angles.sin().double()
    return torch.cat((x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin))


def plain_attention(x, weights, name):
    """`x` is a list of token vectors; latents stand ahead of them, unrotated."""
    q, k, v, o = (weights[f"{name}.{part}_proj.weight"] for part in "qkvo")
    heads, shared, dim = SMALL.num_attention_heads, SMALL.num_key_value_heads, HEAD_DIM
    keys = [[(k @ latent)[g * dim : (g + 1) * dim] for g in range(shared)] for latent in weights[f"{name}.latents"]]
    values = [[(v @ latent)[g * dim : (g + 1) * dim] for g in range(shared)] for latent in weights[f"{name}.latents"]]
    outputs = []
    for position, token in enumerate(x):
        keys.append([plain_rotate((k @ token)[g * dim : (g + 1) * dim], position) for g in range(shared)])
        values.append([(v @ token)[g * dim : (g + 1) * dim] for g in range(shared)])
        mixed = []
        for head in range(heads):
            query = plain_rotate((q @ token)[head * dim : (head + 1) * dim], position)
            group = head // (heads // shared)
            scores = torch.stack([query @ key[group] / math.sqrt(dim) for key in keys])  # all latents, tokens so far
            shares = scores.exp() / scores.exp().sum()
            mixed.append(sum(share * value[group] for share, value in zip(shares, values, strict=True)))
        outputs.append(o @ torch.cat(mixed))
    return outputs


def plain_experts(token, weights, name, bias):
    powers = (weights[f"{name}.router.weight"] @ token).exp()
    scores = powers / powers.sum()
    ranked = sorted(range(SMALL.num_local_experts), key=lambda expert: -(scores[expert] + bias[expert]).item())
    chosen = ranked[: SMALL.num_experts_per_tok]
    output = 0
    for expert in chosen:
        up, down = weights[f"{name}.experts.up"][expert], weights[f"{name}.experts.down"][expert]
        inner = up @ token
        output = output + scores[expert] / sum(scores[e] for e in chosen) * (down @ (inner / (1 + (-inner).exp())))
    return output


def plain_decoder(ids, weights, biases):
    """Logits (T, V) of one row of token ids."""
    x = [weights["embed_tokens.weight"][token] for token in ids]
    for layer in range(SMALL.num_hidden_layers):
        name = f"layers.{layer}"
        normed = [plain_norm(token, weights[f"{name}.input_layernorm.weight"]) for token in x]
        attended = plain_attention(normed, weights, f"{name}.self_attn")
        x = [token + change for token, change in zip(x, attended, strict=True)]
        normed = [plain_norm(token, weights[f"{name}.post_attention_layernorm.weight"]) for token in x]
        mixed = [plain_experts(token, weights, f"{name}.moe.deepspeed_moe", biases[layer]) for token in normed]
        x = [token + change for token, change in zip(x, mixed, strict=True)]
    return torch.stack([weights["embed_tokens.weight"] @ plain_norm(token, weights["norm.weight"]) for token in x])


def test_logits_and_all_gradients_are_those_of_a_plain_decoder():
    model = small_model()
    ids, labels = some_ids(2, 7), some_ids(7, 2).T
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    biases = [router.selection_bias for router in model.routers()]
    expected = torch.stack([plain_decoder(row.tolist(), weights, biases) for row in ids])
    chosen = expected.softmax(-1).flatten(0, 1)[torch.arange(14), labels.flatten()]
    expected_loss = -chosen.log().mean()
    expected_loss.backward()

    close(model(ids), expected)
    loss = model(ids, labels)
    loss.backward()
    close(loss, expected_loss)
    for name, weight in model.named_parameters():
        # An expert that no token chose has no part in the plain decoder, and zero gradients in the model.
        plain = weights[name].grad
        close(weight.grad, torch.zeros_like(weight) if plain is None else plain)
        assert plain is None or plain.abs().max() > 0


# --- padding --------------------------------------------------------------------------------------------------------


def padded(rows, side):
    """Rows of ids and their mask, filled up with token 7 on the given side."""
    longest = max(map(len, rows))
    ids, real = [], []
    for row in rows:
        fill = longest - len(row)
        mine, mask = row.tolist(), [True] * len(row)
        ids.append([7] * fill + mine if side == "left" else mine + [7] * fill)
        real.append([False] * fill + mask if side == "left" else mask + [False] * fill)
    return torch.tensor(ids), torch.tensor(real)


def test_padding_moves_no_gradient():
    model, alone = small_model(), small_model()
    row, longer = some_ids(4), some_ids(6)
    ids, real = padded([row, longer], "left")
    labels = torch.full_like(ids, -100)
    labels[0, 2:] = row
    model(ids, labels, real).backward()
    alone(row.unsqueeze(0), row.unsqueeze(0)).backward()
    for weight, other in zip(model.parameters(), alone.parameters(), strict=True):
        close(weight.grad, other.grad)


def cached_logits(model, ids, steps, real):
    """Logits of `ids` (B, S) fed in `steps` parts through a cache of exactly S tokens."""
    cache = model.new_cache(ids.shape[1])
    parts, end = [], 0
    for step in steps:
        mask = None if real is None else real[:, : end + step]
        parts.append(model(ids[:, end : end + step], attention_mask=mask, cache=cache))
        end += step
    assert end == ids.shape[1]
    return torch.cat(parts, dim=1)


STEPS = [[5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [4, 6, 1, 5], [1] * 16, [16]]
KINDS = {scaling["rope_type"] if scaling else "none": {"rope_scaling": scaling} for scaling in SCALINGS}
KINDS["one latent, interleaved"] = {"num_latent_tokens": 1, "rope_interleaved": True}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_row_padded_on_either_side_or_fed_in_pieces_gives_the_logits_it_gives_alone(changes):
    model = small_model(**changes).eval()
    rows = [some_ids(length) for length in (3, 9, 1, 16)]
    alone = [model(row.unsqueeze(0))[0] for row in rows]
    for side in ("left", "right"):
        ids, real = padded(rows, side)
        for logits, mask, expected in zip(model(ids, attention_mask=real), real, alone, strict=True):
            close(logits[mask], expected)
    rows, alone = rows[1::2], alone[1::2]
    ids, real = padded(rows, "left")
    for steps in STEPS:
        for logits, mask, expected in zip(cached_logits(model, ids, steps, real), real, alone, strict=True):
            close(logits[mask], expected)
        close(cached_logits(model, rows[-1].unsqueeze(0), steps, None)[0], alone[-1])


# --- initial weights ------------------------------------------------------------------------------------------------


def plain_weights(model):
    """The plain parameters by name."""
    return {
        part.name: weight.detach().flatten()[part.start : part.start + part.count].view(part.shape)
        for name, weight in model.named_parameters()
        for part in plain_parts(name, weight.shape, model.topology.first_expert)
    }


def test_an_experts_projections_are_drawn_one_after_the_other():
    weights = plain_weights(Decoder(SMALL.model_copy(update={"gated_mlp": True}), seed=5))
    experts = [name for name in weights if ".layers.1.moe.experts.2." in name]
    assert [name.split(".")[-2] for name in experts] == ["gate_proj", "up_proj", "down_proj"]
    stream = megamoe.model.decoder._generator(5, 1, 2)
    for name in experts:
        std = SMALL.initializer_range / (math.sqrt(2 * SMALL.num_hidden_layers) if "down" in name else 1)
        assert torch.equal(weights[name], torch.empty(weights[name].shape).normal_(0, std, generator=stream))


def test_the_seed_decides_the_initial_weights():
    one, same, other = (dict(Decoder(SMALL, seed=seed).named_parameters()) for seed in (1, 1, 2))
    for name in one:
        assert torch.equal(one[name], same[name])
        assert "norm" in name or not torch.equal(one[name], other[name])


def initial_draws(model):
    """The first numbers of each drawn weight, on the common scale."""
    draws = {}
    for name, weight in plain_weights(model).items():
        if "norm" not in name:
            scale = (
                math.sqrt(2 * SMALL.num_hidden_layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            )
            draws[name] = tuple(round(value * scale, 6) for value in weight.flatten()[:8].tolist())
    return draws


def test_no_two_initial_weights_come_from_the_same_stream():
    first = {}
    for name, draw in initial_draws(Decoder(SMALL)).items():
        assert draw not in first, f"{name} starts like {first[draw]}"
        first[draw] = name


def test_residual_projections_start_smaller_by_the_root_of_twice_the_layers_and_norms_at_1():
    config = SMALL.model_copy(update={
        "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 8, "head_dim": 32, "num_latent_tokens": 64,
        "initializer_range": 0.05,
    })  # fmt: skip
    residual = 0
    for name, weight in plain_weights(Decoder(config)).items():
        if "norm" in name:
            assert (weight == 1).all()
            continue
        is_residual = name.endswith(("self_attn.o_proj.weight", "down_proj.weight"))
        residual += is_residual
        std = 0.05 / 4 if is_residual else 0.05
        spread = 5 / math.sqrt(2 * weight.numel())  # five standard errors
        assert weight.std().item() == pytest.approx(std, rel=spread), name
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel()), name
    assert residual == 8 * (1 + config.num_local_experts)


# --- recomputed blocks ----------------------------------------------------------------------------------------------


def stored_by_a_step(recompute_blocks):
    """(gradients, slots and margins counted, bytes that the blocks kept for backward) of a model with dropout and
    jitter."""
    model = small_model(expert_dropout=0.3, router_jitter_noise=0.2, router_bias_rule="quantile")
    model.recompute_blocks = recompute_blocks
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    ids = some_ids(2, 7)
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, ids)
    size = sum(nbytes for _, nbytes in kept.values())
    loss.backward()
    counts = torch.stack(
        [torch.cat((router.step_counts.unsqueeze(0), router.step_margins)) for router in model.routers()]
    )
    return [weight.grad for weight in model.parameters()], counts, size


def test_recomputed_blocks_give_the_same_gradients_and_counts_to_the_bit_from_less_memory():
    blocks = range(SMALL.num_hidden_layers + 1)
    stored, *recomputed = [stored_by_a_step(number) for number in blocks]
    for gradients, counts, _ in recomputed:
        assert torch.equal(counts, stored[1])
        assert all(torch.equal(one, other) for one, other in zip(gradients, stored[0], strict=True))
    sizes = [size for _, _, size in (stored, *recomputed)]
    assert all(fewer < 0.75 * more for more, fewer in itertools.pairwise(sizes))


def test_nothing_is_recomputed_without_gradients(monkeypatch):
    monkeypatch.setattr(megamoe.model.decoder, "checkpoint", None)
    model = small_model()
    model.recompute_blocks = SMALL.num_hidden_layers
    with torch.no_grad():
        close(model(some_ids(2, 7)), small_model()(some_ids(2, 7)))


# --- names ----------------------------------------------------------------------------------------------------------


def test_no_saved_name_of_a_router_contains_expert():
    names = [name for name in Decoder(SMALL).state_dict() if ".router." in name]
    assert len(names) == 3 * SMALL.num_hidden_layers  # weight, bias and running load
    assert not any("expert" in name for name in names)
