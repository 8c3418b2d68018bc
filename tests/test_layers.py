import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from megamoe.layers import (
    Dropout,
    LatentAttention,
    LayerCache,
    apply_rotary,
    attention_mask,
    rope_frequencies,
    rotary_table,
)

HEAD_DIM, THETA, MAX_POSITIONS = 64, 10_000.0, 128
SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 20, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
]  # fmt: skip


def named(scaling):
    return "none" if scaling is None else "-".join(map(str, scaling.values()))


def llama_config(scaling):
    return LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA, **(scaling or {})},
    )


def frequencies_for(scaling, *lengths):
    return rope_frequencies(HEAD_DIM, THETA, scaling, MAX_POSITIONS, torch.tensor(lengths))


@pytest.mark.parametrize("length", [5, MAX_POSITIONS, MAX_POSITIONS + 1, 500])
@pytest.mark.parametrize("scaling", SCALINGS, ids=named)
def test_scaled_frequencies_are_those_of_transformers(scaling, length):
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](llama_config(scaling), "cpu", seq_len=length)
    frequencies, factor = frequencies_for(scaling, length)
    torch.testing.assert_close(frequencies[0], expected, rtol=2e-6, atol=0)
    assert factor == pytest.approx(expected_factor)


def test_dynamic_frequencies_are_unscaled_up_to_the_maximum_and_lower_beyond_it():
    plain, _ = frequencies_for(None, 1)
    scaled, _ = frequencies_for({"rope_type": "dynamic", "factor": 3.0}, 1, MAX_POSITIONS, MAX_POSITIONS + 1, 500)
    torch.testing.assert_close(scaled[:2], plain.expand(2, -1), rtol=1e-6, atol=0)
    assert (scaled[2, 1:] < plain[0, 1:]).all()
    assert (scaled[3, 1:] < scaled[2, 1:]).all()


@pytest.mark.parametrize("scaling", [None, *SCALINGS], ids=named)
def test_rotation_of_halves_is_llamas(scaling):
    torch.manual_seed(0)
    length = MAX_POSITIONS + 40
    positions = torch.arange(length).unsqueeze(0)
    query, key = torch.randn(2, length, 4, HEAD_DIM), torch.randn(2, length, 2, HEAD_DIM)
    cos, sin = LlamaRotaryEmbedding(llama_config(scaling))(query, positions)
    expected = llama_rotary(query, key, cos, sin, unsqueeze_dim=2)

    rotary = rotary_table(positions, *frequencies_for(scaling, length), torch.float32)
    torch.testing.assert_close(apply_rotary(query, rotary, False), expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(apply_rotary(key, rotary, False), expected[1], rtol=1e-4, atol=1e-4)


def test_rotation_of_neighbours_is_gptjs():
    torch.manual_seed(0)
    x = torch.randn(2, 30, 3, HEAD_DIM)
    cos, sin = rotary_table(torch.arange(30).unsqueeze(0), *frequencies_for(None, 30), torch.float32)
    expected = gptj_rotary(x, sin, cos)
    torch.testing.assert_close(apply_rotary(x, (cos, sin), True), expected)
    assert not torch.allclose(apply_rotary(x, (cos, sin), False), expected)


def test_each_row_is_rotated_by_its_own_positions_and_length():
    torch.manual_seed(0)
    scaling = {"rope_type": "dynamic", "factor": 3.0}
    x = torch.randn(2, 4, 1, HEAD_DIM)
    positions = torch.tensor([[0, 1, 2, 3], [196, 197, 198, 199]])
    both = apply_rotary(x, rotary_table(positions, *frequencies_for(scaling, 4, 200), torch.float32), False)
    for row, length in enumerate((4, 200)):
        rotary = rotary_table(positions[row : row + 1], *frequencies_for(scaling, length), torch.float32)
        torch.testing.assert_close(both[row : row + 1], apply_rotary(x[row : row + 1], rotary, False))


def test_angles_are_taken_in_fp32_and_only_the_table_has_the_models_dtype():
    positions = torch.tensor([[0, 1, 1001]])
    frequencies, factor = frequencies_for(None, 1002)
    fine = rotary_table(positions, frequencies, factor, torch.float32)
    coarse = rotary_table(positions, frequencies, factor, torch.bfloat16)
    for exact, rounded in zip(fine, coarse, strict=True):
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded, exact.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("num_queries", [1, 3, 6])
@pytest.mark.parametrize("num_latents", [0, 2])
def test_a_query_sees_all_latents_real_tokens_up_to_itself_and_itself(num_queries, num_latents):
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]).bool()
    mask = attention_mask(real, num_queries, num_latents)
    assert mask.shape == (4, 1, num_queries, num_latents + 6)
    assert mask.dtype == torch.bool
    for row in range(4):
        for number in range(num_queries):
            query = 6 - num_queries + number
            tokens = [key == query or (key < query and bool(real[row, key])) for key in range(6)]
            assert mask[row, 0, number].tolist() == [True] * num_latents + tokens


def attention(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "num_latent_tokens": 3}
    layer = LatentAttention(**{**sizes, **changes}).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, 0, 0.5)
    return layer


def rotary_of(length):
    frequencies, factor = rope_frequencies(8, 100.0, None, 64, torch.tensor([length]))
    return rotary_table(torch.arange(length).unsqueeze(0), frequencies, factor, torch.float64)


@pytest.mark.parametrize("num_latents", [0, 3])
def test_attention_without_a_mask_is_attention_with_a_mask_of_no_padding(num_latents):
    layer = attention(num_latent_tokens=num_latents)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    mask = attention_mask(torch.ones(2, 5, dtype=torch.bool), 5, num_latents)
    torch.testing.assert_close(layer(x, rotary_of(5)), layer(x, rotary_of(5), mask), rtol=0, atol=1e-12)


def test_the_first_token_sees_itself_and_every_latent_and_no_later_token():
    layer = attention()
    x = torch.randn(1, 5, 24, dtype=torch.float64, requires_grad=True)
    layer(x, rotary_of(5))[0, 0].sum().backward()
    assert x.grad[0, 0].abs().min() > 0
    assert x.grad[0, 1:].abs().max() == 0
    assert layer.latents.grad.abs().min() > 0


def test_latents_are_not_rotated():
    layer = attention()
    x = torch.randn(1, 1, 24, dtype=torch.float64)  # the one token stands at angle 0, so nothing here is rotated
    keys = torch.cat((layer.latents @ layer.k_proj.weight.T, x[0] @ layer.k_proj.weight.T)).view(4, 2, 8)
    values = torch.cat((layer.latents @ layer.v_proj.weight.T, x[0] @ layer.v_proj.weight.T)).view(4, 2, 8)
    query = (x[0, 0] @ layer.q_proj.weight.T).view(6, 8)
    heads = []
    for head in range(6):
        shared = head // 3
        heads.append(torch.softmax(keys[:, shared] @ query[head] / 8**0.5, 0) @ values[:, shared])
    torch.testing.assert_close(layer(x, rotary_of(1))[0, 0], layer.o_proj.weight @ torch.cat(heads))


def test_a_cache_returns_everything_appended_in_order():
    torch.manual_seed(0)
    parts = [(torch.randn(2, 3, new, 4), torch.randn(2, 3, new, 4)) for new in (5, 1, 2)]
    cache = LayerCache(capacity=10)
    assert cache.length == 0
    for count, part in enumerate(parts, start=1):
        key, value = cache.append(*part)
        assert torch.equal(key, torch.cat([key for key, _ in parts[:count]], dim=2))
        assert torch.equal(value, torch.cat([value for _, value in parts[:count]], dim=2))
        assert cache.length == key.shape[2]


def test_a_cache_stays_in_the_memory_of_its_first_append():
    cache = LayerCache(capacity=7)
    first, _ = cache.append(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))  # two latents and one token
    for _ in range(3):
        key, _ = cache.append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    assert cache.length == 6
    assert key.data_ptr() == first.data_ptr()


def test_a_cache_takes_the_latents_once():
    layer = attention()
    cache = LayerCache(capacity=7)
    cos, sin = rotary_of(4)
    x = torch.randn(1, 4, 24, dtype=torch.float64)
    for token in range(4):
        part = slice(token, token + 1)
        mask = attention_mask(torch.ones(1, token + 1, dtype=torch.bool), 1, 3)
        out = layer(x[:, part], (cos[:, part], sin[:, part]), mask, cache)
        assert cache.length == 3 + token + 1
    torch.testing.assert_close(out[:, 0], layer(x, rotary_of(4))[:, 3], rtol=0, atol=1e-12)


# --- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.5, 0.93])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_share_it_says_evenly_over_places_and_scales_the_rest(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(4000, 101, dtype=dtype)  # 101: rows do not begin at a new draw
    out = Dropout(p)(x)
    dropped = (out == 0).double()
    spread = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < 4 * spread / dropped.numel() ** 0.5
    for share in (dropped.mean(0), dropped.mean(1)):
        deviation = (share - p) / spread * (dropped.numel() / len(share)) ** 0.5
        assert deviation.abs().max() < 5
        assert deviation.std() == pytest.approx(1, abs=0.2)
    expected = torch.nn.functional.dropout(x, p)
    assert out.unique().tolist() == expected.unique().tolist()


def test_neighbours_of_one_draw_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (Dropout(0.3)(torch.ones(100_000, 4)) == 0).double()
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / 100_000**0.5


def test_the_gradient_of_dropout_passes_where_the_value_did():
    torch.manual_seed(0)
    x = torch.randn(50, 8, requires_grad=True)
    out = Dropout(0.4)(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad * x, out)
    assert 0 < (x.grad == 0).sum() < x.numel()


def test_dropout_follows_the_seed_and_is_off_in_evaluation():
    layer, x = Dropout(0.5), torch.ones(3, 7)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(layer.eval()(x), x)
    assert layer.train()(x[:0]).shape == (0, 7)
