import copy

import pytest
import torch
from devices import DEVICES, assert_near, rounded

from megamoe.model.attention import GroupedQueryAttention, LayerCache, attention_mask
from megamoe.model.rope import rope_frequencies, rotary_table

HEAD_DIM, THETA, MAX_POSITIONS = 64, 10_000.0, 128


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


@pytest.mark.parametrize("num_latents", [0, 3])
def test_attention_without_a_mask_is_attention_with_a_mask_of_no_padding(num_latents):
    layer = attention(num_latent_tokens=num_latents)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    mask = attention_mask(torch.ones(2, 5, dtype=torch.bool), 5, num_latents)
    rotary = rotary_of(5, num_latents)
    torch.testing.assert_close(layer(x, rotary), layer(x, rotary, mask), rtol=0, atol=1e-12)


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
        rotated = slice(0 if token == 0 else 3 + token, 3 + token + 1)  # the latents come with the first token
        out = layer(x[:, part], (cos[:, rotated], sin[:, rotated]), mask, cache)
        assert cache.length == 3 + token + 1
    torch.testing.assert_close(out[:, 0], layer(x, rotary_of(4))[:, 3], rtol=0, atol=1e-12)
