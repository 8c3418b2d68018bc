"""Count the operators that torch dispatches, as many as a GPU would be given kernels: views are left out."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megamoe.planning.tracer import VIEWS


def traced(backend: str = "aot_eager") -> Any:
    """While it is in use, regions are traced forward and backward, and no kernels built."""
    return mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend))


class Operators(TorchDispatchMode):
    """Operators by name, and the bytes of the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if not self._paused and name not in VIEWS:
            self._add(name, args, kwargs, out)
        return out

    def _add(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        self.calls[name] += 1
        tensors = [one for one in tree_iter((args, kwargs, out)) if isinstance(one, Tensor)]
        self.bytes += sum(one.numel() * one.element_size() for one in tensors)

    def as_one(self, name: str, function: Any) -> Any:
        """`function`, counted as one operator."""

        def counted(*args: Any) -> Any:
            self._paused = True
            try:
                out = function(*args)
            finally:
                self._paused = False
            self._add(name, args, None, out)
            return out

        return counted


class NewTensors(TorchDispatchMode):
    """(operator, number of elements) of each tensor that is made in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {one.untyped_storage().data_ptr() for one in tree_iter(args) if isinstance(one, Tensor)}
        out = func(*args, **(kwargs or {}))
        for one in tree_iter(out):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in known:
                self.made.append((func._schema.name, one.numel()))
        return out


def rms_norm_as_one_operator(operators: Operators) -> Any:
    """A forward for nn.RMSNorm whose two ways are one operator each, as on a GPU; torch makes several on CPU."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
            ctx.save_for_backward(x, weight)
            ctx.eps = eps
            plain = torch.nn.functional.rms_norm
            return operators.as_one("rms_norm", lambda *given: plain(given[0], weight.shape, given[1], eps))(x, weight)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            def gradients(grad: Tensor, x: Tensor, weight: Tensor) -> Any:
                with torch.enable_grad():
                    inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
                    out = torch.nn.functional.rms_norm(inputs[0], weight.shape, inputs[1], ctx.eps)
                return torch.autograd.grad(out, inputs, grad)

            return *operators.as_one("rms_norm_backward", gradients)(grad, *ctx.saved_tensors), None

    return lambda module, x: Norm.apply(x, module.weight, module.eps)
