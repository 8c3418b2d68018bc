import copy
import itertools

import pytest
import torch
from attention_loops import REAL, average, exact_rotary, in_pieces, normed, operators_of, positions_of, turned
from devices import DEVICES, assert_near, rounded
from transformers import Glm4MoeConfig, MiniMaxM2Config, OlmoeConfig, Qwen3MoeConfig
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention, Glm4MoeRotaryEmbedding
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2Attention, MiniMaxM2RotaryEmbedding
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeRotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeRotaryEmbedding

from megamoe.model.attention import GroupedQueryAttention, LayerCache, attention_mask
from megamoe.model.rope import rope_frequencies, rotary_table


def test_a_query_sees_all_latents_real_tokens_up_to_itself_and_itself():
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]).bool()
    for num_queries, num_latents in itertools.product((1, 3, 6), (0, 2)):
        mask = attention_mask(real, num_queries, num_latents)
        assert mask.shape == (4, 1, num_queries, num_latents + 6)
        assert mask.dtype == torch.bool
        for row, number in itertools.product(range(4), range(num_queries)):
            query = 6 - num_queries + number
            tokens = [key == query or (key < query and bool(real[row, key])) for key in range(6)]
            assert mask[row, 0, number].tolist() == [True] * num_latents + tokens


def test_a_window_is_transformers():
    for num_queries, window in itertools.product((1, 4, 7), (1, 3, 9)):
        mask = attention_mask(REAL, num_queries, 0, window)
        expected = sdpa_mask(
            batch_size=2,
            q_length=num_queries,
            kv_length=7,
            q_offset=7 - num_queries,
            mask_function=sliding_window_causal_mask_function(window),
            attention_mask=REAL,
            allow_is_causal_skip=False,
        )
        real = REAL[:, 7 - num_queries :]  # a padded query sees itself here, and nothing there
        assert torch.equal(mask[:, 0][real], expected[:, 0][real])
        assert torch.equal(mask[:, 0][~real].sum(-1), torch.ones((~real).sum(), dtype=torch.long))


def attention(**changes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_latent_tokens": 3,
    }
    layer = GroupedQueryAttention(**{**sizes, **changes}).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, 0, 0.3)
    return layer


OPTIONS = [
    {},
    {"num_latent_tokens": 0, "attention_bias": True},
    {"qk_norm": "head", "attention_bias": True, "attention_out_bias": True},
    {"qk_norm": "head", "num_latent_tokens": 0, "rms_norm_eps": 0.1},
    {"qk_norm": "full", "rms_norm_eps": 0.1},
    {"qk_norm": "full", "num_latent_tokens": 0, "attention_out_bias": True, "rope_interleaved": True},
]


def named(options):
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "none"


def by_the_formula(layer, options, x, real, rotary_dim, window):
    """What attention gives, one query of one head after the other; rows of padding are left 0."""
    weights, positions, eps = layer.state_dict(), positions_of(real), options.get("rms_norm_eps", 1e-5)

    def projected(name, vector):
        return weights[f"{name}_proj.weight"] @ vector + weights.get(f"{name}_proj.bias", 0)

    def heads(name, vector, position=None):
        """Normed as the options say, the first dimensions rotated where there is a position."""
        vector, weight = projected(name, vector), weights.get(f"{name}_norm.weight")
        if options.get("qk_norm") == "full" and weight is not None:
            vector = normed(vector, weight, eps)
        for head in vector.split(8):
            if options.get("qk_norm") == "head" and weight is not None:
                head = normed(head, weight, eps)
            if position is not None:
                first = turned(head[:rotary_dim], position, options.get("rope_interleaved", False))
                head = torch.cat((first, head[rotary_dim:]))
            yield head

    out = torch.zeros_like(x)
    latents = list(weights.get("latents", ()))
    for row, token in real.nonzero().tolist():
        seen = [other for other in range(token + 1) if real[row, other] and (not window or token - other < window)]
        keys = [list(heads("k", one)) for one in latents]
        keys += [list(heads("k", x[row, other], positions[row, other])) for other in seen]
        values = [list(heads("v", one)) for one in [*latents, *x[row, seen]]]
        queries = heads("q", x[row, token], positions[row, token])
        found = [
            average(query, [key[head // 3] for key in keys], [value[head // 3] for value in values], 8**-0.5)
            for head, query in enumerate(queries)
        ]
        out[row, token] = projected("o", torch.cat(found))
    return out


@pytest.mark.parametrize(("rotary_dim", "window"), [(8, None), (4, 3)])
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_attention_is_its_formula_whole_and_from_a_cache(options, rotary_dim, window):
    layer = attention(**options)
    num_latents = options.get("num_latent_tokens", 3)
    assert (layer.latents is None) == (num_latents == 0)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    rotary = exact_rotary(positions_of(REAL), rotary_dim, layer.rope_interleaved, num_latents)
    whole = layer(x, rotary, attention_mask(REAL, 7, num_latents, window))
    with torch.no_grad():
        expected = by_the_formula(layer, options, x, REAL, rotary_dim, window)
        torch.testing.assert_close(whole[REAL], expected[REAL], rtol=0, atol=1e-10)
        pieces = in_pieces(layer, x, rotary, REAL, num_latents, window)
        torch.testing.assert_close(pieces[REAL], expected[REAL], rtol=0, atol=1e-10)


# transformers' attention: its parts, fields of its configuration, the same in ours, dimensions rotated.
THEIRS = {
    "olmoe": (OlmoeAttention, OlmoeRotaryEmbedding, OlmoeConfig, {}, {"qk_norm": "full"}, 8),
    "qwen3_moe": (
        Qwen3MoeAttention, Qwen3MoeRotaryEmbedding, Qwen3MoeConfig, {"head_dim": 12, "attention_bias": True},
        {"head_dim": 12, "qk_norm": "head", "attention_bias": True, "attention_out_bias": True}, 12,
    ),
    "minimax_m2": (
        MiniMaxM2Attention, MiniMaxM2RotaryEmbedding, MiniMaxM2Config, {"head_dim": 12},
        {"head_dim": 12, "qk_norm": "full"}, 6,
    ),
    "glm4_moe": (
        Glm4MoeAttention, Glm4MoeRotaryEmbedding, Glm4MoeConfig, {"use_qk_norm": True, "attention_bias": True},
        {"qk_norm": "head", "attention_bias": True}, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", THEIRS)
def test_attention_is_that_of_transformers_models(family):
    module, rotary_module, config_class, fields, options, rotary_dim = THEIRS[family]
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 0.01}
    head_dim = options.get("head_dim", 8)
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": rotary_dim / head_dim}
    config = config_class(**sizes, **{"head_dim": 8, **fields}, rope_parameters=rope, attn_implementation="eager")
    layer = GroupedQueryAttention(**sizes, **{"head_dim": 8, **options})
    torch.manual_seed(0)
    theirs = module(config, 0)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, 0, 0.3)
    theirs.load_state_dict(layer.state_dict())

    x = torch.randn(2, 7, 32)
    positions, mask = positions_of(REAL), attention_mask(REAL, 7, 0)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    expected, _ = theirs(x, position_embeddings=rotary_module(config)(x, positions), attention_mask=bias)
    frequencies, factor = rope_frequencies(rotary_dim, 100.0, None, 64, torch.tensor([7]))
    rotary = rotary_table(positions, frequencies, factor, torch.float32, False)
    torch.testing.assert_close(layer(x, rotary, mask), expected, rtol=1e-4, atol=1e-5)


def test_each_option_adds_so_many_operators():
    for options, rotary_dim, most in (
        ({}, 8, 29),
        ({"qk_norm": "head"}, 8, 33),
        ({"qk_norm": "full"}, 8, 33),
        ({"attention_bias": True, "attention_out_bias": True}, 8, 33),
        ({}, 4, 31),
    ):
        operators = operators_of(attention(num_latent_tokens=0, **options), rotary_dim)
        assert sum(operators.calls.values()) <= most, (options, operators.calls)


def rotary_of(length, num_latents=3, dtype=torch.float64):
    frequencies, factor = rope_frequencies(8, 100.0, None, 64, torch.tensor([length]))
    positions = torch.arange(length).unsqueeze(0)
    return rotary_table(positions, frequencies, factor, dtype, False, num_latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_attention_and_its_gradients_in_fp32_and_bf16_are_those_in_float64(device, dtype):
    exact = rounded(attention(), dtype)
    layer = copy.deepcopy(exact).to(device, dtype)
    x, grad = torch.randn(2, 2, 70, 24).to(dtype).double().unbind()
    x.requires_grad_()
    rotary = rotary_of(70, dtype=dtype)
    exact_out = exact(x, tuple(part.double() for part in rotary))
    exact_out.backward(grad)

    low = x.detach().to(device, dtype).requires_grad_()
    out = layer(low, tuple(part.to(device) for part in rotary))
    out.backward(grad.to(device, dtype))
    assert_near(out, exact_out, dtype, "output")
    assert_near(low.grad, x.grad, dtype, "gradient of the input")
    for (name, found), expected in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert_near(found.grad, expected.grad, dtype, name)


def test_attention_without_a_mask_is_attention_with_a_mask_of_no_padding():
    for num_latents in (0, 3):
        layer = attention(num_latent_tokens=num_latents)
        x = torch.randn(2, 5, 24, dtype=torch.float64)
        mask = attention_mask(torch.ones(2, 5, dtype=torch.bool), 5, num_latents)
        rotary = rotary_of(5, num_latents)
        torch.testing.assert_close(layer(x, rotary), layer(x, rotary, mask), rtol=0, atol=1e-12)


def test_a_cache_returns_everything_appended_in_order_from_the_memory_of_its_first_append():
    torch.manual_seed(0)
    parts = [(torch.randn(2, 3, new, 6), torch.randn(2, 3, new, 4)) for new in (5, 1, 2)]
    cache, first = LayerCache(capacity=10), None
    assert cache.length == 0
    for count, part in enumerate(parts, start=1):
        key, value = cache.append(*part)
        assert torch.equal(key, torch.cat([key for key, _ in parts[:count]], dim=2))
        assert torch.equal(value, torch.cat([value for _, value in parts[:count]], dim=2))
        assert cache.length == key.shape[2]
        first = first or key.data_ptr()
        assert key.data_ptr() == first
