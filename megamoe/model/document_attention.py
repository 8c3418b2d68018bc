"""Attention that stays within a document, of which a row may hold several, in training and evaluation.

Shape legend: B batch, T positions, N tokens (B * T), n documents, M latent tokens, K keys (N + n * M), H query heads,
G key/value heads, d head_dim, v the width of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from megamoe.data.document_bounds import Documents
from megamoe.model import attention

# Of the positions in a call for one document: in 16 bits, a CPU makes kernels for each length that it has not seen.
MULTIPLES = {torch.bfloat16: 64, torch.float16: 64}


class DocumentMask(NamedTuple):
    """Stands for a mask: a query sees the latents and, of its document, the tokens up to itself."""

    starts: Tensor  # (n + 1,) int32: where each document's queries begin among the N tokens, and N
    key_starts: Tensor  # (n + 1,) int32: where its keys begin, a copy of the latents first, and K
    keys: Tensor | None  # (K,) int64: which of the B * (M + T) keys each of these is; None without latents: in order
    host_starts: Tensor  # as `starts`, in the host's memory
    longest: int  # tokens of a document
    is_one_call: bool  # of a kernel for sequences of varying lengths, or else one call for each document
    num_latents: int
    window: int | None  # of the tokens, a query sees itself and those at the window - 1 positions before it

    @classmethod
    def of(cls, documents: Documents, is_one_call: bool, num_latents: int, window: int | None) -> DocumentMask:
        starts, key_starts, keys = documents.starts, documents.starts, None
        if num_latents:
            numbers = torch.arange(len(starts), dtype=starts.dtype, device=starts.device)
            key_starts = starts + num_latents * numbers
            rows, length = documents.positions.shape
            size = rows * length + num_latents * (len(starts) - 1)
            number = numbers[:-1].repeat_interleave(key_starts.diff(), output_size=size)  # of each key's document
            begin, within = starts[number], torch.arange(size, device=starts.device) - key_starts[number]
            keys = begin // length * (num_latents + length) + within + (within >= num_latents) * (begin % length)
        return cls(starts, key_starts, keys, documents.host_starts, documents.longest, is_one_call, num_latents, window)

    @classmethod
    def of_rows(cls, rows: int, length: int, device: torch.device, window: int | None) -> DocumentMask:
        """For a kernel, of rows that are one document each, without latents."""
        starts = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
        return cls(starts, starts, None, starts, length, True, 0, window)


Mask = Tensor | DocumentMask | None


def takes_lengths(x: Tensor, head_dim: int) -> bool:
    """Whether flash attention takes sequences of varying lengths on the device and in the dtype of `x`."""
    if x.device.type == "cpu" or (x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0)):
        return False
    return x.dtype in (torch.bfloat16, torch.float16) and head_dim <= 256


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float | None = None) -> Tensor:
    """As `attention.attend`, of documents too; for a `DocumentMask` the keys are (B, G, M + T, d)."""
    if not isinstance(mask, DocumentMask):
        return attention.attend(query, key, value, mask, scale)
    sizes, width, scale = (query.shape[0], query.shape[2]), value.shape[-1], scale or query.shape[-1] ** -0.5
    multiple = 8 if mask.is_one_call else 1  # flash attention takes widths of whole 16 bytes; kernels, one for all
    widest = -(-max(query.shape[-1], width) // multiple) * multiple
    query, key, value = (_padded(one, 0, widest - one.shape[-1]) for one in (query, key, value))
    query, key, value = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    if mask.keys is not None:
        key, value = key.index_select(0, mask.keys), value.index_select(0, mask.keys)
    out = attend_packed(query, key, value, mask, scale)
    return out[..., :width].flatten(1).unflatten(0, sizes)


def _padded(x: Tensor, before: int, behind: int, dim: int = -1) -> Tensor:
    """x with zeros; torch's `pad` copies where there are none."""
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim % x.dim()) + (before, behind)) if before or behind else x


def attend_packed(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float) -> Tensor:
    """(N, H, d), (K, G, d) and (K, G, d) -> (N, H, d)."""
    latents, window = mask.num_latents, mask.window
    if not mask.is_one_call:
        return _one_by_one(query, key, value, mask, scale)
    out = varlen_attn(
        query,
        key,
        value,
        mask.starts,
        mask.key_starts,
        mask.longest,
        mask.longest + latents,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(out, Tensor)
    return out


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float) -> Tensor:
    lengths, latents, window, outs = mask.host_starts.diff().tolist(), mask.num_latents, mask.window, []
    of_keys = [length + latents for length in lengths]
    for q, k, v in zip(query.split(lengths), key.split(of_keys), value.split(of_keys), strict=True):
        visible, length, rest = None, len(q), -len(k) % MULTIPLES.get(q.dtype, 1)
        if window is not None and window < length:
            size = length + rest
            visible = attention.attention_mask(q.new_ones(1, size, dtype=torch.bool), size, 0, window)
        # As many queries as keys: those before the tokens' see latents, and are cut off.
        padded = _padded(q, latents, rest, dim=0), _padded(k, 0, rest, dim=0), _padded(v, 0, rest, dim=0)
        q, k, v = (one.transpose(0, 1).unsqueeze(0) for one in padded)
        outs.append(attention.attend(q, k, v, visible, scale)[0, latents : latents + length])
    return torch.cat(outs).unflatten(1, (query.shape[1], -1))
