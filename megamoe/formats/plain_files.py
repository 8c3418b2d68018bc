"""A model's weights under plain names in .pt, .bin or .safetensors files, without training state."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamoe.config.optimizers import MASTERS
from megamoe.formats.source import WeightsAlone
from megamoe.formats.tensor_names import Place
from megamoe.formats.unpickle import safe_load
from megamoe.model.names import is_buffer
from megamoe.utils.errors import UserError, shown
from megamoe.utils.json_files import read_json

STATE_DICT_ENDINGS = (".pt", ".pth", ".bin")
# What unquantised weights are stored as, by the name that safetensors has for it.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

ADAPTER = "adapter_"  # of PEFT, next to the weights that it changes
UNUSED = ".rotary_emb.inv_freq"  # older files have them; they follow from the configuration


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it
    get: Callable[[], Tensor]  # of safetensors, a view of the mapped file


class StoredWeights(WeightsAlone):
    """Weights whose plain tensors are stretches of those in files."""

    def __init__(self, tensors: dict[str, Stored], places: dict[str, Place], shapes: dict[str, tuple[int, ...]]):
        """
        Args:
            places: of the plain tensors.
            shapes: theirs.
        """
        self._tensors, self._places = tensors, places
        self.shapes = {name: shapes[name] for name in places if not is_buffer(name)}
        self.buffers = {
            name: self.read(name, MASTERS, 0, math.prod(shapes[name])).view(shapes[name])
            for name in filter(is_buffer, places)
        }

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        assert kind == MASTERS
        place = self._places[name]
        return self._tensors[place.tensor].get().flatten()[place.start + start : place.start + start + count].float()


class PlainFiles(StoredWeights):
    """Weights under plain names in .pt or .safetensors files."""

    def __init__(self, files: list[Path]):
        """Raises UserError if a file is damaged or holds something else."""
        tensors: dict[str, Stored] = {}
        for file in files:
            tensors |= open_safetensors(file) if file.suffix == ".safetensors" else _state_dict(file)
        shapes = {name: stored.shape for name, stored in tensors.items()}
        super().__init__(tensors, {name: Place(name, shape) for name, shape in shapes.items()}, shapes)


def open_safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of a file by name; only its header is read. Raises UserError."""
    try:
        opened = safe_open(file, framework="pt")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        return {
            name: Stored(tuple(one.get_shape()), one.get_dtype(), partial(opened.get_tensor, name))
            for name, one in slices.items()
        }
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); make or fetch it again.") from None


def open_unquantised(files: list[Path], directory: Path) -> dict[str, Stored]:
    """The tensors of a model's files, all of FLOATS. Raises UserError for quantised weights."""
    tensors = {name: stored for file in files for name, stored in open_safetensors(file).items()}
    for name, stored in tensors.items():
        if stored.dtype not in FLOATS:
            raise UserError(
                f"{directory}: {name} ({stored.dtype}) belongs to quantised weights; give the directory of the "
                "unquantised ones."
            )
    return {name: stored for name, stored in tensors.items() if not name.endswith(UNUSED)}


def _state_dict(file: Path) -> dict[str, Stored]:
    state = safe_load(file)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} is no state_dict: not a dict of tensors; give one of megamoe convert.")
    return {name: Stored(tuple(tensor.shape), str(tensor.dtype), tensor.detach) for name, tensor in state.items()}


def weight_files(folder: Path, suffix: str) -> list[Path]:
    """The files of a Hugging Face directory's weights: those that the index names, where there is one. Raises UserError
    if one is missing."""
    for index in folder.glob(f"*{suffix}.index.json"):
        if index.name.startswith(ADAPTER):
            continue
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index} has no weight_map of tensor names to file names; make or fetch it again.")
        names = sorted(set(weight_map.values()))
        for name in names:
            if not os.path.isfile(folder / name):  # False for a name that no file can have, where pathlib raises
                raise UserError(f"{index} names {shown(name)}, which is missing beside it; bring it back.")
        return [folder / name for name in names]
    pattern = "pytorch_model*.bin" if suffix == ".bin" else f"*{suffix}"
    files = (file for file in folder.glob(pattern) if file.is_file())
    return sorted(file for file in files if not file.name.startswith(ADAPTER))
