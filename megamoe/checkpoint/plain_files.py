"""A model's weights under plain names in .pt, .bin or .safetensors files, without training state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamoe.checkpoint.unpickle import safe_load
from megamoe.errors import UserError
from megamoe.model.names import EMBEDDING, HEAD, is_buffer
from megamoe.optimizers import MASTERS


class PlainFiles:
    """Weights under plain names in .pt or .safetensors files."""

    has_optimizer = False
    state_names: tuple[str, ...] = ()

    def __init__(self, files: list[Path]):
        """Raises UserError if a file is damaged or holds something else."""
        self._tensors: dict[str, Callable[[], Tensor]] = {}
        shapes = {}
        for file in files:
            for name, (shape, get) in (_safetensors if file.suffix == ".safetensors" else _state_dict)(file).items():
                shapes[name], self._tensors[name] = shape, get
        if shapes.pop(HEAD, None):
            if EMBEDDING not in shapes:
                raise UserError(f"{files[0]}: has {HEAD} without {EMBEDDING}, which it is tied to; give both.")
            head, embedding = (self._tensors[name]() for name in (HEAD, EMBEDDING))
            if not torch.equal(head, embedding):
                raise UserError(f"{files[0]}: lm_head.weight is not the embedding; this model ties the two.")
        self.shapes = {name: shape for name, shape in shapes.items() if not is_buffer(name)}
        self.buffers = {name: self._tensors[name]().float() for name in shapes if is_buffer(name)}

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        assert kind == MASTERS
        return self._tensors[name]().flatten()[start : start + count].float()

    def training_state(self) -> dict[str, Any]:
        raise AssertionError("plain weights have no training state")


def _safetensors(file: Path) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
    try:
        opened = safe_open(file, framework="pt")
        return {
            name: (tuple(opened.get_slice(name).get_shape()), partial(opened.get_tensor, name))
            for name in opened.keys()  # noqa: SIM118 - it is no dict
        }
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); make or fetch it again.") from None


def _state_dict(file: Path) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
    state = safe_load(file)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} is no state_dict: not a dict of tensors; give one of tools/convert_checkpoint.py.")
    return {name: (tuple(tensor.shape), partial(_unchanged, tensor)) for name, tensor in state.items()}


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
