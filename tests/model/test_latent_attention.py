import copy

import pytest
import torch
from attention_loops import REAL, average, exact_rotary, in_pieces, normed, operators_of, positions_of, turned
from devices import DEVICES, assert_near, rounded
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from megamoe.model.attention import attention_mask
from megamoe.model.latent_attention import MultiHeadLatentAttention
from megamoe.model.rope import rope_frequencies, rotary_table, softmax_scale

SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
BIASES = {"attention_bias": True, "attention_out_bias": True}


def attention(**changes):
    torch.manual_seed(0)
    layer = MultiHeadLatentAttention(**{**SIZES, **changes}).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, 0, 0.3)
    return layer


def named(options):
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "none"


def by_the_formula(layer, options, x, real):
    """What attention gives, one query of one head after the other; rows of padding are left 0."""
    weights, positions, sizes = layer.state_dict(), positions_of(real), {**SIZES, **options}
    eps, interleaved = options.get("rms_norm_eps", 1e-6), options.get("rope_interleaved", False)
    nope, rope, rank = sizes["qk_nope_head_dim"], sizes["qk_rope_head_dim"], sizes["kv_lora_rank"]

    def projected(name, vector):
        return weights[f"{name}.weight"] @ vector + weights.get(f"{name}.bias", 0)

    def queries(vector, position):
        if sizes["q_lora_rank"]:
            compressed = normed(projected("q_a_proj", vector), weights["q_a_layernorm.weight"], eps)
            vector = projected("q_b_proj", compressed)
        else:
            vector = projected("q_proj", vector)
        for head in vector.split(nope + rope):
            yield torch.cat((head[:nope], turned(head[nope:], position, interleaved)))

    def keys_and_values(vector, position):
        compressed = projected("kv_a_proj_with_mqa", vector)
        shared = turned(compressed[rank:], position, interleaved)
        vector = projected("kv_b_proj", normed(compressed[:rank], weights["kv_a_layernorm.weight"], eps))
        for head in vector.split(nope + sizes["v_head_dim"]):
            yield torch.cat((head[:nope], shared)), head[nope:]

    out = torch.zeros_like(x)
    scale = options.get("softmax_scale", (nope + rope) ** -0.5)
    for row, token in real.nonzero().tolist():
        seen = [list(keys_and_values(x[row, other], positions[row, other]))
                for other in range(token + 1) if real[row, other]]  # fmt: skip
        found = [
            average(query, [one[head][0] for one in seen], [one[head][1] for one in seen], scale)
            for head, query in enumerate(queries(x[row, token], positions[row, token]))
        ]
        out[row, token] = projected("o_proj", torch.cat(found))
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_lora_rank": 8, **BIASES},
        {"q_lora_rank": 8, "v_head_dim": 10, "rms_norm_eps": 0.1},
        {"v_head_dim": 12, "rope_interleaved": True, "softmax_scale": 0.7},
    ],
    ids=named,
)
def test_attention_is_its_formula_masked_causal_and_from_a_cache(options):
    layer = attention(**options)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    every = torch.ones_like(REAL)
    with torch.no_grad():
        rotary = exact_rotary(positions_of(REAL), 4, layer.rope_interleaved)
        expected = by_the_formula(layer, options, x, REAL)
        whole = layer(x, rotary, attention_mask(REAL, 7, 0))
        torch.testing.assert_close(whole[REAL], expected[REAL], rtol=0, atol=1e-10)
        torch.testing.assert_close(in_pieces(layer, x, rotary, REAL, 0, None)[REAL], expected[REAL], rtol=0, atol=1e-10)
        causal = layer(x, exact_rotary(positions_of(every), 4, layer.rope_interleaved))
        torch.testing.assert_close(causal, by_the_formula(layer, options, x, every), rtol=0, atol=1e-10)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0,
        "mscale_all_dim": 0.7}  # fmt: skip


@pytest.mark.parametrize(
    ("rank", "interleaved", "scaling"), [(None, False, None), (8, True, None), (None, True, YARN), (8, False, YARN)]
)
def test_attention_is_that_of_transformers(rank, interleaved, scaling):
    options = {**SIZES, "q_lora_rank": rank}
    config = DeepseekV3Config(
        **options,
        num_key_value_heads=3,
        attention_bias=True,
        max_position_embeddings=64,
        rope_interleave=interleaved,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, **(scaling or {})},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    layer = MultiHeadLatentAttention(
        **options,
        **BIASES,
        rope_interleaved=interleaved,
        rms_norm_eps=1e-6,  # transformers' norms within this attention have that one, whatever its configuration says
        softmax_scale=softmax_scale(10, scaling),
    )
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, 0, 0.3)
    theirs = DeepseekV3Attention(config, 0)
    theirs.load_state_dict(layer.state_dict())

    x = torch.randn(2, 7, 24)
    positions, mask = positions_of(REAL), attention_mask(REAL, 7, 0)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    expected, _ = theirs(x, position_embeddings=DeepseekV3RotaryEmbedding(config)(x, positions), attention_mask=bias)
    frequencies, factor = rope_frequencies(4, 100.0, scaling, 64, torch.tensor([7]))
    rotary = rotary_table(positions, frequencies, factor, torch.float32, interleaved)
    torch.testing.assert_close(layer(x, rotary, mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients_in_fp32_and_bf16_are_those_in_float64(masked, device, dtype):
    sizes = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}  # multiples of 8 for a GPU's kernels
    exact = rounded(attention(q_lora_rank=8, **sizes), dtype)
    layer = copy.deepcopy(exact).to(device, dtype)
    x, grad = torch.randn(2, 2, 70, 24).to(dtype).double().unbind()
    x.requires_grad_()
    real = torch.arange(70) >= torch.tensor([[0], [5]])
    mask = attention_mask(real, 70, 0) if masked else None
    rotary = tuple(part.to(dtype) for part in exact_rotary(torch.arange(70).unsqueeze(0), 8))
    exact_out = exact(x, tuple(part.double() for part in rotary), mask)
    exact_out.backward(grad)

    low = x.detach().to(device, dtype).requires_grad_()
    out = layer(low, tuple(part.to(device) for part in rotary), mask.to(device) if masked else None)
    out.backward(grad.to(device, dtype))
    assert_near(out, exact_out, dtype, "output")
    assert_near(low.grad, x.grad, dtype, "gradient of the input")
    for (name, found), expected in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert_near(found.grad, expected.grad, dtype, name)


def test_training_takes_one_fused_kernel_and_so_many_operators():
    narrow, equal = {"v_head_dim": 6}, {"v_head_dim": 10}
    compressed = {"q_lora_rank": 8}
    for options, most in ((narrow, 38), (narrow | compressed, 43), (equal, 34), (equal | compressed, 39)):
        operators = operators_of(attention(**options), 4)
        assert operators.calls["_scaled_dot_product_flash_attention_for_cpu"] == 1
        assert operators.calls["_scaled_dot_product_flash_attention_for_cpu_backward"] == 1
        assert sum(operators.calls.values()) <= most, (options, operators.calls)
