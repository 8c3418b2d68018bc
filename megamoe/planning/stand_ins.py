"""What stands in for kernels, ranks and values while a model is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from megamoe.model import document_attention, grouped_gemm
from megamoe.model.document_attention import DocumentMask
from megamoe.model.loss import OfLogits
from megamoe.planning.sharding import Setup
from megamoe.planning.tracer import Tracer


@contextmanager
def stand_ins(setup: Setup, tracer: Tracer) -> Iterator[None]:
    """Rows go evenly to experts and come evenly from ranks. RMSNorm and dropout are one operator each way on a GPU,
    several on CPU."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: Any = None, **_: Any
    ) -> Tensor:
        numbers = None
        if attn_mask is not None:  # as torch prepares it for a kernel
            numbers = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
        visible = key.shape[2] * (0.5 if attn_mask is None else 1)
        return _Attention.apply(query, key, value, numbers, visible, tracer)

    def of_documents(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float) -> Tensor:
        window = min(mask.window or mask.longest, mask.longest)
        visible = mask.num_latents + window - window**2 / (2 * mask.longest)
        query, key, value = (one.transpose(0, 1).unsqueeze(0) for one in (query, key, value))
        return _Attention.apply(query, key, value, None, visible, tracer)[0].transpose(0, 1)

    def to_list(values: Tensor) -> Any:
        tracer.work[tracer.phase].waits += 1
        if values.dim() == 3:  # slots for each expert and rows, sent to each rank and received
            _, ranks, parts = values.shape
            sent = [_even(count, ranks) for count in (setup.rows, setup.sent_rows)]
            received = [_even(count, ranks) for count in (setup.received, setup.received_tokens)]
            return [
                [[*_even(slots, parts - 1), rows] for slots, rows in zip(*counts, strict=True)]
                for counts in (sent, received)
            ]
        return list(accumulate(_even(setup.places, len(values))))  # where each expert's rows end

    def exchange(received: Tensor, *_: Any, async_op: bool = False, **__: Any) -> Any:
        with tracer.as_one():
            received.new_empty(0)
        return _Exchange(tracer) if async_op else None

    replaced: list[tuple[Any, str, Any]] = [
        (F, "scaled_dot_product_attention", attention),
        (document_attention, "attend_packed", of_documents),
        (FakeTensor if setup.on_cpu else Tensor, "tolist", to_list),
        (dist, "all_to_all_single", exchange),
        (grouped_gemm, "kernel_for", lambda *_: "grouped_mm" if setup.kernel == "triton" else setup.kernel),
    ]
    if not setup.on_cpu:
        replaced += [
            (nn.RMSNorm, "forward", lambda norm, x: _Norm.apply(x, norm.weight, tracer)),
            (F, "dropout", lambda x, p, training, inplace: torch.native_dropout(x, p, training)[0] if p else x),
        ]
    with ExitStack() as stack:
        for owner, name, replacement in replaced:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def compiled_losses(setup: Setup, tracer: Tracer) -> OfLogits:
    """Stands for `losses_of_logits`, compiled: kernels that read the logits for the sums, and write the gradient in
    their place; in Triton the largest logit and the sum are one pass."""

    def of_logits(
        logits: Tensor, _: Tensor, counts: Tensor, z_loss_coef: float, factor: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with tracer.as_one(logits, *[logits] * setup.on_cpu):
            cross_entropy = logits.new_zeros((), dtype=torch.float32)
        with tracer.as_one(logits) as written:
            at_target = torch.empty_like(counts, dtype=logits.dtype)
            written.append(logits)
        return cross_entropy, torch.zeros_like(cross_entropy) if z_loss_coef else None, at_target

    return of_logits


def _even(count: int, parts: int) -> list[int]:
    return [count * (number + 1) // parts - count * number // parts for number in range(parts)]


class _Exchange:
    """Handle of an exchange between ranks that has begun; of one whose rows were kept, there is nothing to wait for."""

    def __init__(self, tracer: Tracer):
        self.tracer, self.count = tracer, int(tracer.ran)
        tracer.exchanges += self.count

    def wait(self) -> None:
        self.tracer.exchanges -= self.count


class _Attention(torch.autograd.Function):
    """A fused kernel each way, which keeps for each query the sum of its scores' exponentials; backward computes the
    scores again. Causal, it computes half of them; with a mask all; `visible` of a query."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, visible: float, tracer: Tracer
    ) -> Tensor:
        batch, heads, length, width = query.shape
        ctx.tracer, ctx.flops = tracer, 2.0 * batch * heads * length * visible * (width + value.shape[3])
        with tracer.as_one(flops=ctx.flops):
            out = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)
            sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with ctx.tracer.as_one(flops=2.5 * ctx.flops):
            grads = [torch.empty_like(one) for one in ctx.saved_tensors[:3]]
        return *grads, None, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tracer: Tracer) -> Tensor:
        ctx.tracer = tracer
        with tracer.as_one(x, weight) as written:
            written += [torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)]
        ctx.save_for_backward(x, weight, written[1])
        return written[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        with ctx.tracer.as_one(grad, x, weight) as written:
            written += [torch.empty_like(x), torch.empty_like(weight)]
        return *written, None
