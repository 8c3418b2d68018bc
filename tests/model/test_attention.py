"""Both kinds of attention against their formulas; masks and the cache."""

import copy

import formulas
import pytest
import torch
from devices import DEVICES, assert_near, close, rounded
from formulas import THETA, positions_of

from megamoe.model.attention import GroupedQueryAttention, LayerCache, attention_mask
from megamoe.model.latent_attention import MultiHeadLatentAttention
from megamoe.model.rope import rotary_table

# Left padding, and none.
REAL = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()


def random_layer(layer):
    torch.manual_seed(0)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, 0, 0.3)
    return layer.double()


def grouped(**options):
    sizes = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    return random_layer(GroupedQueryAttention(**{**sizes, "num_latent_tokens": 3, **options}))


def latent(**options):
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "q_lora_rank": None, "kv_lora_rank": 10,
             "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6}  # fmt: skip
    return random_layer(MultiHeadLatentAttention(**{**sizes, **options}))


def exact_rotary(positions, rotary_dim, interleaved=False, num_unrotated=0):
    """A table with angles in float64."""
    frequencies = THETA ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    return rotary_table(positions, frequencies.unsqueeze(0), 1.0, torch.float64, interleaved, num_unrotated)


def in_pieces(layer, x, rotary, num_latents, window):
    """The layer's outputs from a cache: three tokens, then one after the other."""
    cache = LayerCache(num_latents + x.shape[1])
    outs, past = [], 0
    for end in range(3, x.shape[1] + 1):
        mask = attention_mask(REAL[:, :end], end - past, num_latents, window)
        rotated = slice(num_latents + past if past else 0, num_latents + end)  # the latents come with the first tokens
        outs.append(layer(x[:, past:end], tuple(part[:, rotated] for part in rotary), mask, cache))
        past = end
    return torch.cat(outs, dim=1)


def check_whole_causal_and_cached(layer, x, formula, rotary_dim, num_latents=0, window=None):
    def table(real):
        return exact_rotary(positions_of(real), rotary_dim, layer.rope_interleaved, num_latents)

    with torch.no_grad():
        expected = formula(REAL)
        close(layer(x, table(REAL), attention_mask(REAL, 7, num_latents, window))[REAL], expected[REAL])
        close(in_pieces(layer, x, table(REAL), num_latents, window)[REAL], expected[REAL])
        if window is None:
            every = torch.ones_like(REAL)
            close(layer(x, table(every)), formula(every))


def named(options):
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "none"


@pytest.mark.parametrize(("rotary_dim", "window"), [(8, None), (4, 3)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_latent_tokens": 0, "attention_bias": True},
        {"qk_norm": "head", "attention_bias": True, "attention_out_bias": True},
        {"qk_norm": "head", "num_latent_tokens": 0, "rms_norm_eps": 0.1},
        {"qk_norm": "full", "rms_norm_eps": 0.1},
        {"qk_norm": "full", "num_latent_tokens": 0, "attention_out_bias": True, "rope_interleaved": True},
    ],
    ids=named,
)
def test_grouped_query_attention_is_its_formula_masked_causal_and_from_a_cache(options, rotary_dim, window):
    layer, x = grouped(**options), torch.randn(2, 7, 24, dtype=torch.float64)
    given = {"qk_norm": options.get("qk_norm"), "eps": options.get("rms_norm_eps", 1e-5), "window": window or 0}
    given |= {"rotary_dim": rotary_dim, "interleaved": layer.rope_interleaved}

    def formula(real):
        return formulas.attention(layer.state_dict(), x, real, 8, **given)

    check_whole_causal_and_cached(layer, x, formula, rotary_dim, options.get("num_latent_tokens", 3), window)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_lora_rank": 8, "attention_bias": True, "attention_out_bias": True},
        {"q_lora_rank": 8, "v_head_dim": 10},
        {"v_head_dim": 12, "rope_interleaved": True, "softmax_scale": 0.7},
    ],
    ids=named,
)
def test_latent_attention_is_its_formula_masked_causal_and_from_a_cache(options):
    layer, x = latent(**options), torch.randn(2, 7, 24, dtype=torch.float64)
    given = {"interleaved": layer.rope_interleaved, "scale": options.get("softmax_scale")}

    def formula(real):
        return formulas.latent_attention(layer.state_dict(), x, real, 6, 4, options.get("v_head_dim", 6), **given)

    check_whole_causal_and_cached(layer, x, formula, 4)


COMPRESSED = {
    "q_lora_rank": 8,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # as GPUs' kernels want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("build", "options", "masked"), [(grouped, {}, False), (latent, COMPRESSED, False), (latent, COMPRESSED, True)]
)
def test_attention_and_its_gradients_in_fp32_and_bf16_are_those_in_float64(build, options, masked, device, dtype):
    exact = rounded(build(**options), dtype)
    layer = copy.deepcopy(exact).to(device, dtype)
    x, grad = torch.randn(2, 2, 70, 24).to(dtype).double().unbind()
    x.requires_grad_()
    mask = attention_mask(torch.arange(70) >= torch.tensor([[0], [5]]), 70, 0) if masked else None
    num_latents = 3 if build is grouped else 0
    rotary = [part.to(dtype) for part in exact_rotary(torch.arange(70).unsqueeze(0), 8, num_unrotated=num_latents)]
    exact_out = exact(x, tuple(part.double() for part in rotary), mask)
    exact_out.backward(grad)

    low = x.detach().to(device, dtype).requires_grad_()
    out = layer(low, tuple(part.to(device) for part in rotary), mask.to(device) if masked else None)
    out.backward(grad.to(device, dtype))
    assert_near(out, exact_out, dtype, "output")
    assert_near(low.grad, x.grad, dtype, "gradient of the input")
    for (name, found), expected in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert_near(found.grad, expected.grad, dtype, name)
