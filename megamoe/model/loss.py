"""Cross-entropy and z-loss of a linear head, without ever holding all logits.

Shape legend: N tokens, D hidden_size, V vocab_size, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamoe.data.source import NO_LABEL

# Bytes of fp32 logits that are held at a time: those of a whole micro-batch would be the largest tensor of the step
# several times over. On CPU these are 512 tokens of `moe-680m`, measured best; a GPU needs larger GEMMs.
CPU_LOGITS = 96 * 2**20
GPU_LOGITS = 2**30


def loss_chunk(tokens: int, vocab_size: int, on_cpu: bool) -> int:
    """Tokens whose logits are held at a time: the fewest chunks that CPU_LOGITS or GPU_LOGITS allow, equally long."""
    most = max((CPU_LOGITS if on_cpu else GPU_LOGITS) // (4 * vocab_size), 1)
    chunks = max(math.ceil(tokens / most), 1)
    return max(math.ceil(tokens / chunks), 1)


class HeadLoss(NamedTuple):
    """The loss of a head and its parts, each () but for the last."""

    total: Tensor  # to train on: cross-entropy + coefficient * z-loss
    cross_entropy: Tensor  # without gradient, as the next
    z_loss: Tensor
    nats: Tensor | None  # (N,), the cross-entropy of each token, 0 where no label counts; None if not by row


class TokenScores(NamedTuple):
    """How a model takes each label, with no gradient; of any shape, the same for both."""

    nats: Tensor  # cross-entropy, at least fp32; 0 where no label counts
    is_likeliest: Tensor  # bool: no token is more likely than the label; True where no label counts


@torch.no_grad()
def chunked_token_scores(hidden: Tensor, weight: Tensor, labels: Tensor) -> TokenScores:
    """The scores (N,) of each label under the logits `hidden @ weight.T`; arguments as of `chunked_head_loss`."""
    chunk = loss_chunk(len(hidden), len(weight), hidden.device.type == "cpu")
    parts = [
        _scores(rows, weight, of_rows) for rows, of_rows in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    return TokenScores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _scores(hidden: Tensor, weight: Tensor, labels: Tensor) -> TokenScores:
    counts = labels != NO_LABEL
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none")
    return TokenScores(nats, ~counts | (logits.argmax(1) == labels))


def losses_of_logits(
    logits: Tensor, target: Tensor, counts: Tensor, z_loss_coef: float, factor: float, by_row: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cross-entropy and z-loss (None with 0), sums over the rows that count, and the gradient of their weighted sum by
    the target's logit (C, 1). The gradient by the other logits takes the place of `logits`.

    Args:
        logits: (C, V).
        target: (C, 1), an id for each row.
        counts: (C, 1) bool.
        factor: of the gradient; with 0 none is computed.
        by_row: give the cross-entropy of each row (C, 1), not their sum.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if torch.compiler.is_compiling():
        # Each pass has an expression of its own: what two of them share would be written to memory in `wide`.
        log_powers = F.log_softmax(logits, 1, dtype=wide)
        chosen = logits.gather(1, target).to(wide)
        log_total = chosen - log_powers.gather(1, target)
        powers, total = log_powers.exp(), torch.ones_like(log_total)
    else:  # in place
        powers = logits.to(wide)
        chosen, highest = powers.gather(1, target), powers.amax(1, keepdim=True)
        total = powers.sub_(highest).exp_().sum(1, keepdim=True)
        log_total = highest + total.log()
    cross_entropy = torch.where(counts, log_total - chosen, 0)
    cross_entropy = cross_entropy if by_row else cross_entropy.sum()
    z_loss = torch.where(counts, log_total.square(), 0).sum() if z_loss_coef else None
    if not factor:
        return cross_entropy, z_loss, None
    of_target = of_row = counts * factor
    if z_loss_coef:  # a logit's probability is also the derivative of log_total
        of_row = of_target * (1 + 2 * z_loss_coef * log_total)
    at_target = (chosen - log_total).exp() * of_row - of_target
    logits.copy_(powers.mul_(of_row / total))
    return cross_entropy, z_loss, at_target.to(logits.dtype)


OfLogits = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]


def chunked_head_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss_coef: float = 0.0, of_logits: OfLogits = losses_of_logits
) -> HeadLoss:
    """The losses of the logits `hidden @ weight.T`, at least fp32; 0 if no label counts.

    The cross-entropy is in nats; the z-loss the squared logarithm of the sum of the logits' exponentials (PaLM,
    arXiv:2204.02311, section 5). Both are sums over the tokens whose labels count, divided by N.

    Args:
        hidden: (N, D).
        weight: (V, D), of the head.
        labels: (N,); NO_LABEL where none counts.
        z_loss_coef: of the z-loss in the total; with 0 none is computed, and it is 0.
        of_logits: `losses_of_logits`, compiled or not, and `by_row` for `nats`.

    The gradients of a chunk are computed while its logits are there, so that backward need not make them again: a
    quarter of the head's FLOPs is saved. (After Liger Kernel's fused linear cross-entropy, arXiv:2410.10989.) Both
    losses have one gradient, made in the same pass, which is why the coefficient has to be known here.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return HeadLoss(*_ChunkedHeadLoss.apply(hidden, weight, labels, z_loss_coef, needs_grad, of_logits))


class _ChunkedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        z_loss_coef: float,
        needs_grad: bool,
        of_logits: OfLogits,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # The gradients of the sum: those of the mean could be lost to fp16 before its loss scale comes in backward.
        grad_hidden = torch.empty_like(hidden) if needs_grad else hidden.new_empty(0)
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad else weight.new_empty(0)
        cross_entropy, z_loss = hidden.new_zeros(2, dtype=wide).unbind()
        nats: list[Tensor] = []
        chunk = loss_chunk(len(hidden), len(weight), hidden.device.type == "cpu")
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            grads = (grad_hidden[rows], grad_weight) if needs_grad else None
            of_chunk = _sums_of_losses(hidden[rows], weight, labels[rows], z_loss_coef, grads, of_logits)
            nats += [of_chunk[0].squeeze(1)] if of_chunk[0].dim() else []
            cross_entropy += of_chunk[0].sum() if nats else of_chunk[0]
            if of_chunk[1] is not None:
                z_loss += of_chunk[1]
        count = hidden.new_full((), max(len(labels), 1), dtype=wide)  # a GPU rounds what it divides by a number
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        ctx.weight_dtype = weight.dtype
        cross_entropy, z_loss = cross_entropy / count, z_loss / count
        of_tokens = torch.cat(nats) if nats else None
        ctx.mark_non_differentiable(cross_entropy, z_loss, *([] if of_tokens is None else [of_tokens]))
        return cross_entropy + z_loss_coef * z_loss, cross_entropy, z_loss, of_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor):  # type: ignore[override]
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad / (count * _lift(grad_hidden.dtype))
        # In fp32, for a GPU would round the scale to the gradient's 16 bits.
        by_hidden = (grad_hidden.to(scale.dtype) * scale).to(grad_hidden.dtype)
        return by_hidden, (grad_weight * scale).to(ctx.weight_dtype), None, None, None, None


def _lift(dtype: torch.dtype) -> float:
    """What the logits' gradients are multiplied by before they become `dtype`.

    A softmax over 50,000 entries is near 2e-5, where fp16 has lost digits (it does from 6e-5 down); times 8, the sum
    over a chunk still has room.
    """
    return 8.0 if dtype == torch.float16 else 1.0


def _sums_of_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    z_loss_coef: float,
    grads: tuple[Tensor, Tensor] | None,
    of_logits: OfLogits,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy and z-loss (None with 0) of one chunk, as of `of_logits`; the gradient of their weighted sum by
    `hidden` is written to the first of `grads`, that by `weight` added to the second, both times `_lift`.

    A separate function, so that a chunk's logits are freed before the next chunk's are made.
    """
    counts = (labels != NO_LABEL).unsqueeze(1)
    target = torch.where(counts, labels.unsqueeze(1), 0)
    logits = hidden @ weight.T
    factor = _lift(hidden.dtype) if grads else 0.0
    cross_entropy, z_loss, at_target = of_logits(logits, target, counts, z_loss_coef, factor)
    if grads:
        assert at_target is not None
        logits.scatter_(1, target, at_target)  # not in a compiled region, which would copy all logits for it
        torch.mm(logits, weight, out=grads[0])
        grads[1].add_(logits.T @ hidden)
    return cross_entropy, z_loss
