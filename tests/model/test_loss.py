import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES
from operators import NewTensors
from torch._inductor.utils import run_and_get_code

import megamoe.model.loss
from megamoe.model.loss import CPU_LOGITS, GPU_LOGITS, chunked_head_loss, loss_chunk, losses_of_logits


@pytest.fixture(params=["eager", "compiled"])
def of_logits(request):
    torch._dynamo.reset()
    is_compiled = request.param == "compiled"
    return torch.compile(losses_of_logits, fullgraph=True, backend="aot_eager") if is_compiled else losses_of_logits


def head(dtype, tokens=14, hidden=6, vocab=11, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(size, hidden, generator=generator, dtype=torch.float64) for size in (tokens, vocab)]
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[[0, 1, 9]] = -100
    return *(tensor.to(device, dtype).requires_grad_() for tensor in draw), labels.to(device)


@pytest.mark.parametrize(("on_cpu", "most"), [(True, CPU_LOGITS), (False, GPU_LOGITS)])
def test_chunks_are_as_few_as_the_bytes_of_their_logits_allow_and_equally_long(on_cpu, most):
    for tokens in (1, 2, 511, 512, 513, 2048, 5461, 5462, 16_384, 100_003):
        for vocab_size in (2, 300, 49_152, 163_840):
            chunk = loss_chunk(tokens, vocab_size, on_cpu)
            lengths = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
            case = f"{tokens} tokens, {vocab_size} ids"
            assert 4 * max(lengths) * vocab_size <= most, case
            assert len(lengths) == 1 or 4 * vocab_size * math.ceil(tokens / (len(lengths) - 1)) > most, case
            assert max(lengths) - min(lengths) < len(lengths), case
    assert loss_chunk(10, 2**40, on_cpu) == 1  # not even one token's fit
    assert loss_chunk(8192, 49_152, on_cpu) == (512 if on_cpu else 4096)  # of moe-680m
    assert loss_chunk(0, 300, on_cpu) > 0


def plain_parts(hidden, weight, labels, coefficient, scale=1.0):
    """Cross-entropy, z-loss and the gradients of their weighted sum by torch, in float64; sums over those that count,
    divided by all."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    logits = hidden @ weight.T
    cross_entropy = F.cross_entropy(logits, labels, ignore_index=-100)
    z_loss = logits[labels != -100].exp().sum(-1).log().square().mean() if coefficient else 0 * cross_entropy
    cross_entropy, z_loss = ((labels != -100).double().mean() * one for one in (cross_entropy, z_loss))
    ((cross_entropy + coefficient * z_loss) * scale).backward()
    return cross_entropy.detach(), z_loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_losses_and_gradients_are_those_of_all_logits_at_once(coefficient, of_logits, monkeypatch):
    for chunk in (1, 5, 14, 512):
        monkeypatch.setattr(megamoe.model.loss, "loss_chunk", lambda *_, chunk=chunk: chunk)
        hidden, weight, labels = head(torch.float64)
        loss = chunked_head_loss(hidden, weight, labels, coefficient, partial(of_logits, by_row=True))
        nats = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="none")
        torch.testing.assert_close(loss.nats, nats.detach(), rtol=1e-12, atol=1e-14)
        assert not loss.nats.requires_grad, chunk
        (loss.total * 3).backward()
        exact = plain_parts(hidden, weight, labels, coefficient, 3)
        found = loss.cross_entropy, loss.z_loss, hidden.grad, weight.grad
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14, msg=lambda said, at=chunk: f"{at}: {said}")
        torch.testing.assert_close(loss.total.detach(), exact[0] + coefficient * exact[1])
        assert not loss.cross_entropy.requires_grad, chunk
        assert not loss.z_loss.requires_grad, chunk


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str
)
@pytest.mark.parametrize("device", DEVICES)
def test_losses_are_fp32_and_gradients_have_the_dtype_of_what_they_belong_to(device, of_logits, dtype, rtol):
    for coefficient in (0.0, 0.1):
        hidden, weight, labels = head(dtype, device=device)
        loss = chunked_head_loss(hidden, weight, labels, coefficient, partial(of_logits, by_row=True))
        loss.total.backward()
        assert [part.dtype for part in loss] == [torch.float32] * 4, coefficient
        assert hidden.grad.dtype == weight.grad.dtype == dtype, coefficient
        found = loss.cross_entropy, loss.z_loss, hidden.grad, weight.grad
        for one, exact in zip(found, plain_parts(hidden, weight, labels, coefficient), strict=True):
            assert (one - exact).norm() <= rtol * exact.norm(), (coefficient, exact.shape)


def test_a_loss_scale_keeps_fp16_gradients_that_are_below_its_smallest_number():
    hidden, weight, labels = head(torch.float16)
    factor = 2.0**-24  # alone, these gradients would be zeros in fp16
    (chunked_head_loss(hidden, weight, labels).total * factor * 2.0**16).backward()
    expected = plain_parts(hidden, weight, labels, 0.0, factor * 2.0**16)
    for one, exact in zip((hidden.grad, weight.grad), expected[2:], strict=True):
        assert (one - exact).norm() <= 0.01 * exact.norm(), exact.shape


@pytest.mark.parametrize("device", DEVICES)
def test_no_label_at_all_gives_losses_of_0_and_zero_gradients(device, of_logits):
    hidden, weight, labels = head(torch.float32, device=device)
    loss = chunked_head_loss(hidden, weight, torch.full_like(labels, -100), 0.1, of_logits)
    loss.total.backward()
    assert [part.item() for part in loss[:3]] == [0, 0, 0]
    assert loss.nats is None
    assert hidden.grad.abs().max() == weight.grad.abs().max() == 0


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_fp16_keeps_the_small_gradients_of_a_large_vocabulary(coefficient, of_logits):
    hidden, weight, labels = head(torch.float16, tokens=10, vocab=50_000)
    with torch.no_grad():
        weight *= 0.1  # every entry near 1 / 50,000
    (chunked_head_loss(hidden, weight, labels, coefficient, of_logits).total * 2.0**12).backward()
    exact = plain_parts(hidden, weight, labels, coefficient, 2.0**12)[3]
    unseen = torch.ones(50_000, dtype=torch.bool)
    unseen[labels[labels >= 0]] = False
    assert (weight.grad[unseen] - exact[unseen]).norm() <= 6e-4 * exact[unseen].norm()


def test_where_no_gradient_is_asked_for_none_is_computed(monkeypatch):
    monkeypatch.setattr(torch, "mm", None)
    hidden, weight, labels = head(torch.float64)
    with torch.no_grad():
        loss = chunked_head_loss(hidden, weight, labels).total
    torch.testing.assert_close(loss, plain_parts(hidden, weight, labels, 0.0)[0])


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_one_tensor_of_the_logits_of_a_chunk_is_made_and_none_larger_with_the_z_loss_too(coefficient, monkeypatch):
    monkeypatch.setattr(megamoe.model.loss, "CPU_LOGITS", 4 * 4 * 64)
    hidden, weight, labels = head(torch.float32, tokens=32, hidden=2, vocab=64)
    with NewTensors() as tensors:
        chunked_head_loss(hidden, weight, labels, coefficient).total.backward()
    sizes = [numel for _, numel in tensors.made]
    assert max(sizes) == 4 * 64
    assert sizes.count(4 * 64) == 32 / 4


def test_compiled_losses_make_nothing_of_the_size_of_the_logits_and_replace_them_by_the_gradient():
    logits, target = torch.randn(24, 100, dtype=torch.bfloat16), torch.randint(100, (24, 1))
    expected = logits.clone()
    losses_of_logits(expected, target, target > 9, 0.1, 1.0)
    compiled = torch.compile(losses_of_logits, fullgraph=True, dynamic=False)
    _, (code,) = run_and_get_code(compiled, logits, target, target > 9, 0.1, 1.0)
    assert set(re.findall(r"= empty_strided_cpu\(\((.*?)\)", code)) == {"24, 1", ""}
    assert (logits - expected).norm() < 0.01 * expected.norm()
