"""What a model gives a device to do and what it keeps there: asked of the model itself, which runs without values.

What is around the blocks runs once, and one block of each kind, forward and backward: on the meta device, which stands
for a GPU, or as fake tensors of a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from megamoe.config.model import ModelConfig
from megamoe.config.run import Recompute
from megamoe.data.document_bounds import Documents
from megamoe.model import decoder, multi_token
from megamoe.model.block import Block, build_router_losses
from megamoe.model.document_attention import Mask
from megamoe.model.recompute import run_recomputed
from megamoe.model.rope import Rotary
from megamoe.model.topology import ExpertTopology
from megamoe.planning.sharding import Setup
from megamoe.planning.stand_ins import compiled_losses, stand_ins
from megamoe.planning.tracer import Event, Tracer
from megamoe.planning.work import Work

BLOCK, END = "block", "end"  # events: a block runs here; a pass is over
AROUND, ACTIVATIONS, TEMPORARIES = "embedding, head and loss", "activations", "temporaries"  # kinds of bytes
DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True)
class Trace:
    """Of one part of a model. Events of a backward pass have the names of the parameters whose gradients come."""

    work: dict[str, Work]  # by phase: forward, head (what follows the blocks), backward
    meanwhile: dict[str, Work]  # of it, while ranks exchange rows
    events: dict[str, list[Event]]  # of forward and backward
    buffers: int  # bytes
    is_dense: bool = False  # of a block


@dataclass(frozen=True)
class ModelTrace:
    """Of a micro-batch."""

    around: Trace
    blocks: dict[str, Trace]  # by name, first block first; that of multi-token prediction comes last


def model_trace(setup: Setup) -> ModelTrace:
    """The trace of a setup's model on one rank, whose experts get equally many rows."""
    # A plan varies these, on which the trace of a block depends only by whether it is recomputed, and how.
    imbalance = setup.imbalance if setup.ep_size > 1 else 1.0
    alike = replace(setup, world_size=setup.ep_size, accumulation=1, imbalance=imbalance)
    alike = replace(alike, recompute_blocks=0, recompute="whole", zero_stage=0, bucket=0)
    trace = _traced(alike, None)
    if not setup.recompute_blocks:
        return trace
    recomputed = list(_traced(alike, setup.recompute).blocks.items())[: setup.recompute_blocks]
    return replace(trace, blocks=trace.blocks | dict(recomputed))


@lru_cache
def _traced(setup: Setup, recompute: Recompute | None) -> ModelTrace:
    model, topology = setup.model, setup.topology()
    with ExitStack() as stack:
        if setup.on_cpu:
            stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.device("cpu" if setup.on_cpu else "meta"))
        tracer = Tracer(setup.places - setup.received)
        gap = partial(_Gap, tracer)
        with mock.patch.object(decoder, "Block", gap), mock.patch.object(multi_token, "Block", gap):
            whole = decoder.Decoder(model, seed=None, topology=topology)
        if setup.compiled:
            whole.of_logits = compiled_losses(setup, tracer)
        gaps = {name: module for name, module in whole.named_modules() if isinstance(module, _Gap)}
        lengths = setup.seq_len, setup.seq_len + model.num_nextn_predict_layers
        given = [torch.empty(setup.micro_batch, length, dtype=torch.int64) for length in lengths]
        documents = _documents(setup)
        around = _run(setup, whole, tracer, lambda: whole(*given, documents=documents), given, (AROUND, AROUND))
        of_kind: dict[Any, Trace] = {}
        for one in gaps.values():
            if one.kind not in of_kind:
                of_kind[one.kind] = _block(setup, recompute, Block(model, topology, one.is_dense), *one.given)
    return ModelTrace(around, {name: of_kind[one.kind] for name, one in gaps.items()})


def _documents(setup: Setup) -> Documents | None:
    """Equally long ones; None where the model sees across their borders, or they are as long as a sample."""
    rows, length = setup.micro_batch, setup.seq_len
    longest = setup.document_tokens if setup.model.document_attention else None
    documents = Documents.of([np.arange(0, length, longest or length)] * rows, [length] * rows, length)
    return documents and documents.map(lambda one: torch.empty(one.shape, dtype=one.dtype))


def _block(
    setup: Setup, recompute: Recompute | None, block: Block, shape: torch.Size, rotary: Rotary, mask: Mask
) -> Trace:
    anchor, tracer = torch.zeros((), requires_grad=True), Tracer(setup.places - setup.received)

    def forward() -> Tensor:
        x = _Begin.apply(anchor, shape, DTYPES[setup.weight_bytes], tracer)
        run = partial(run_recomputed, block, recompute) if recompute else block
        return _End.apply(*run(x, rotary, mask, None, None), tracer)

    given = [one for one in tree_iter((anchor, rotary, mask)) if isinstance(one, Tensor)]
    return _run(setup, block, tracer, forward, given, (ACTIVATIONS, TEMPORARIES))


def _run(
    setup: Setup,
    module: nn.Module,
    tracer: Tracer,
    forward: Callable[[], Tensor],
    given: list[Tensor],
    kinds: tuple[str, str],
) -> Trace:
    """Both passes.

    Args:
        given: tensors whose bytes are not of this part.
        kinds: of the bytes that are made in forward and in backward.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(DTYPES[setup.weight_bytes])
    tracer.watch(module)
    for tensor in given:
        tracer.ignore(tensor)
    with stand_ins(setup, tracer), tracer:
        tracer.begin("forward", kinds[0])
        loss = forward()
        tracer.mark(END)
        tracer.begin("backward", kinds[1])
        loss.backward()
        if tracer.events["backward"][-1].name != END:
            tracer.mark(END)  # around the blocks, nothing marks it
    buffers = sum(buffer.nbytes for buffer in module.buffers())
    return Trace(tracer.work, tracer.meanwhile, tracer.events, buffers, isinstance(module, Block) and module.is_dense)


class _Gap(nn.Module):
    """In the place of a block: it gives what a block gives, and keeps what all blocks share."""

    def __init__(self, tracer: Tracer, config: ModelConfig, topology: ExpertTopology, is_dense: bool):
        super().__init__()
        self.tracer, self.is_dense = tracer, is_dense
        self.has_losses = not is_dense and build_router_losses(config) is not None
        self.given: Any = None

    @property
    def kind(self) -> tuple[bool, int]:
        """Equal for blocks that are equal."""
        return self.is_dense, id(self.given[2])

    def forward(self, x: Tensor, rotary: Rotary, mask: Mask, *_: Any) -> tuple[Tensor, Tensor | None]:
        self.given = x.shape, rotary, mask
        out, losses = _Skip.apply(x, *rotary, self.tracer)
        return out, losses if self.has_losses else None


class _Skip(torch.autograd.Function):
    """A gap's two ways. What enters a block is counted by its own trace."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, tracer: Tracer) -> Any:
        tracer.mark(BLOCK, without=x.nbytes)
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        ctx.tracer = tracer
        tracer.phase = "head"
        with tracer.uncounted():
            return torch.empty_like(x), x.new_zeros(2, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> Any:
        ctx.tracer.mark(BLOCK, without=grad.nbytes)
        with ctx.tracer.uncounted():
            return torch.empty_like(grad), None, None, None


class _Begin(torch.autograd.Function):
    """What enters a block."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shape: torch.Size, dtype: torch.dtype, tracer: Tracer) -> Tensor:
        ctx.tracer = tracer
        with tracer.uncounted():
            return anchor.new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.tracer.mark(END)
        return None, None, None, None


class _End(torch.autograd.Function):
    """What follows a block: the gradient of what it gives is there when backward begins."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, losses: Tensor | None, tracer: Tracer) -> Tensor:
        ctx.tracer, ctx.like = tracer, (out.shape, out.dtype, losses is not None)
        with tracer.uncounted():
            return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        shape, dtype, has_losses = ctx.like
        ctx.tracer.begin("backward", TEMPORARIES)
        with ctx.tracer.uncounted():
            losses = grad.new_zeros(2, dtype=torch.float32) if has_losses else None
            return grad.new_empty(shape, dtype=dtype), losses, None
