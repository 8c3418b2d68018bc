"""A model's weights under plain names in .pt, .bin or .safetensors files, without training state."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamoe.config.optimizers import MASTERS
from megamoe.formats.source import WeightsAlone
from megamoe.formats.unpickle import safe_load
from megamoe.model.names import is_buffer
from megamoe.utils.errors import UserError, shown
from megamoe.utils.json_files import read_json

STATE_DICT_ENDINGS = (".pt", ".pth", ".bin")
# What unquantised weights are stored as, by the name that safetensors has for it.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

UNUSED = re.compile(r".*\.rotary_emb\.inv_freq")  # older files have them; they follow from the configuration
QUANTISED = re.compile(r".*\.(qweight|qzeros|scales|g_idx|weight_scale|weight_scale_inv|absmax|quant_map)")


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it
    get: Callable[[], Tensor]  # of safetensors, a view of the mapped file


class PlainFiles(WeightsAlone):
    """Weights under plain names in .pt or .safetensors files."""

    def __init__(self, files: list[Path]):
        """Raises UserError if a file is damaged or holds something else."""
        self._tensors: dict[str, Callable[[], Tensor]] = {}
        shapes = {}
        for file in files:
            read = open_safetensors if file.suffix == ".safetensors" else _state_dict
            for name, stored in read(file).items():
                shapes[name], self._tensors[name] = stored.shape, stored.get
        self.shapes = {name: shape for name, shape in shapes.items() if not is_buffer(name)}
        self.buffers = {name: self._tensors[name]().float() for name in shapes if is_buffer(name)}

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        assert kind == MASTERS
        return self._tensors[name]().flatten()[start : start + count].float()


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
        if stored.dtype not in FLOATS or QUANTISED.fullmatch(name):
            raise UserError(
                f"{directory}: {name} ({stored.dtype}) belongs to quantised weights; give the directory of the "
                "unquantised ones."
            )
    return {name: stored for name, stored in tensors.items() if not UNUSED.fullmatch(name)}


def _state_dict(file: Path) -> dict[str, Stored]:
    state = safe_load(file)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} is no state_dict: not a dict of tensors; give one of tools/convert_checkpoint.py.")
    return {
        name: Stored(tuple(tensor.shape), str(tensor.dtype), partial(_unchanged, tensor))
        for name, tensor in state.items()
    }


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def weight_files(folder: Path, suffix: str) -> list[Path]:
    """The files of a Hugging Face directory's weights: those that the index names, where there is one. Raises UserError
    if one is missing or not in the folder."""
    for index in folder.glob(f"*{suffix}.index.json"):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index} has no weight_map of tensor names to file names; make or fetch it again.")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{index} names {shown(name)}, outside its folder; make or fetch it again.")
            if not os.path.isfile(folder / name):  # False for a name that no file can have, where pathlib raises
                raise UserError(f"{index} names {shown(name)}, which is missing beside it; bring it back.")
        return [folder / name for name in names]
    pattern = "pytorch_model*.bin" if suffix == ".bin" else f"*{suffix}"
    return sorted(file for file in folder.glob(pattern) if file.is_file())
