"""Attention that stays within a document, of which a row may hold several, in training and evaluation.

Shape legend: B batch, T positions, N tokens (B * T), n documents, M latent tokens, K keys (N + n * M), H query heads,
G key/value heads, d head_dim, v the width of a value.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from megamoe.data.document_bounds import Documents
from megamoe.model import attention

MOST_WIDTH = 256  # of a head, which flash attention takes


class DocumentMask(NamedTuple):
    """Stands for a mask: a query sees the latents and, of its document, the tokens up to itself."""

    starts: Tensor  # (n + 1,) int32: where each document's queries begin among the N tokens, and N
    key_starts: Tensor  # (n + 1,) int32: where its keys begin, a copy of the latents first, and K
    keys: Tensor | None  # (K,) int64: which of the B * (M + T) keys each of these is; None without latents: in order
    longest: int  # tokens of a document
    num_latents: int = 0
    window: int | None = None  # of the tokens, a query sees itself and those at the window - 1 positions before it

    @classmethod
    def of(cls, documents: Documents, num_latents: int, window: int | None) -> DocumentMask:
        starts, longest = documents.starts, documents.longest
        if not num_latents:
            return cls(starts, starts, None, longest, 0, window)
        rows, length = documents.positions.shape
        key_starts = starts + num_latents * torch.arange(len(starts), dtype=starts.dtype, device=starts.device)
        size = rows * length + num_latents * (len(starts) - 1)
        places = torch.arange(size, device=starts.device)

        def of_keys(of_documents: Tensor) -> Tensor:
            return of_documents.long().repeat_interleave(key_starts.diff(), output_size=size)

        within, begin = places - of_keys(key_starts[:-1]), of_keys(starts[:-1])  # place in the document's keys
        is_token = within >= num_latents
        keys = begin // length * (num_latents + length) + within + is_token * (begin % length)
        return cls(starts, key_starts, keys, longest, num_latents, window)

    @classmethod
    def of_rows(cls, rows: int, length: int, window: int, device: torch.device) -> DocumentMask:
        """Of rows that are one document each."""
        starts = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
        return cls(starts, starts, None, length, 0, window)


def is_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def takes_documents(x: Tensor, width: int) -> bool:
    """Whether there is a kernel for a `DocumentMask` on the device and in the dtype of `x`, for heads of a width."""
    if is_on_cpu(x):
        return True
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return x.dtype in (torch.bfloat16, torch.float16) and width <= MOST_WIDTH


def plain_mask(documents: Documents, num_latents: int, window: int | None) -> Tensor:
    """The mask (B, 1, T, M + T) bool of documents, for devices without a kernel for a `DocumentMask`."""
    positions = documents.positions
    rows = attention.attention_mask(torch.ones_like(positions, dtype=torch.bool), positions.shape[1], 0, window)
    number = (positions == 0).cumsum(1)
    is_same = number.unsqueeze(2) == number.unsqueeze(1)
    return F.pad(rows & is_same.unsqueeze(1), (num_latents, 0), value=True)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | DocumentMask | None, scale: float | None = None
) -> Tensor:
    """As `attention.attend`, of documents too; for a `DocumentMask` the keys are (B, G, M + T, d)."""
    if not isinstance(mask, DocumentMask):
        return attention.attend(query, key, value, mask, scale)
    sizes, widths = (query.shape[0], query.shape[2]), (query.shape[3], value.shape[3])
    scale = widths[0] ** -0.5 if scale is None else scale
    width = max(widths) if is_on_cpu(query) else -(-max(widths) // 8) * 8  # flash takes one, of whole 16 bytes
    query, key, value = (_widened(one, width).transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    if mask.keys is not None:
        key, value = key.index_select(0, mask.keys), value.index_select(0, mask.keys)
    out = attend_packed(query, key, value, mask, scale)
    return out[..., : widths[1]].flatten(1).unflatten(0, sizes)


def _widened(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x


def attend_packed(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float) -> Tensor:
    """(N, H, d), (K, G, d) and (K, G, d) -> (N, H, d)."""
    if is_on_cpu(query):
        out, _ = _attend_on_cpu(query, key, value, mask.starts, mask.key_starts, scale, mask.window or 0)
        return out
    out = varlen_attn(
        query,
        key,
        value,
        mask.starts,
        mask.key_starts,
        mask.longest,
        mask.longest + mask.num_latents,
        scale=scale,
        window_size=(-1 if mask.window is None else mask.window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(out, Tensor)
    return out


# --- on CPU -----------------------------------------------------------------------------------------------------------

# One call of torch's fused kernel for each document. An operator of its own, whose lengths no compiled region sees.


@torch.library.custom_op("megamoe::attend_on_cpu", mutates_args=())
def _attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """(N, H, d), and the logarithm of each query's sum of exponentials, (N, H)."""
    out, sums = torch.empty_like(query), _sums(query)
    for of_queries, of_keys, latents, mask in _documents(query, starts, key_starts, window):
        one, of_one = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _padded(query[of_queries], latents), *(_heads_first(each[of_keys]) for each in (key, value)),
            is_causal=True, attn_mask=mask, scale=scale,
        )  # fmt: skip
        out[of_queries], sums[of_queries] = one[0, :, latents:].transpose(0, 1), of_one[0, :, latents:].T
    return out, sums


@_attend_on_cpu.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), _sums(query)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward_on_cpu(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients_on_cpu(grad, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None, None


_attend_on_cpu.register_autograd(_backward_on_cpu, setup_context=_save_for_backward)


@torch.library.custom_op("megamoe::attend_on_cpu_backward", mutates_args=())
def _gradients_on_cpu(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, out: Tensor,
    sums: Tensor, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """By query, key and value."""
    grads = [torch.empty_like(one) for one in (query, key, value)]
    for of_queries, of_keys, latents, mask in _documents(query, starts, key_starts, window):
        grad_out, queries, outs = (_padded(each[of_queries], latents) for each in (grad, query, out))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, queries, *(_heads_first(each[of_keys]) for each in (key, value)), outs,
            F.pad(sums[of_queries].T, (latents, 0)).unsqueeze(0), 0.0, True, attn_mask=mask, scale=scale,
        )  # fmt: skip
        for each, rows, one in zip(grads, (of_queries, of_keys, of_keys), found, strict=True):
            each[rows] = one[0, :, one.shape[2] - rows.stop + rows.start :].transpose(0, 1)
    return grads[0], grads[1], grads[2]


@_gradients_on_cpu.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _sums(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))


def _documents(
    query: Tensor, starts: Tensor, key_starts: Tensor, window: int
) -> Iterator[tuple[slice, slice, int, Tensor | None]]:
    """Of each document, its queries, its keys, how many more these are, and the mask of its window, if it needs one."""
    pairs = (itertools.pairwise(one.tolist()) for one in (starts, key_starts))
    for queries, keys in zip(*pairs, strict=True):
        length = queries[1] - queries[0]
        mask = None
        if 0 < window < length:
            hidden = torch.ones(length, length, dtype=torch.bool).tril(-window)
            mask = query.new_zeros(length, length).masked_fill_(hidden, -torch.inf)
        yield slice(*queries), slice(*keys), keys[1] - keys[0] - length, mask


def _padded(x: Tensor, latents: int) -> Tensor:
    """x (L, H, d) as (1, H, M + L, d): causal attention wants as many queries as keys."""
    return _heads_first(F.pad(x, (0, 0, 0, 0, latents, 0)) if latents else x)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)
