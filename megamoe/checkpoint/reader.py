"""Read a model's weights and optimizer state by plain names, whatever wrote them and for however many ranks.

    RankFiles        what DeepSpeed saves: each rank's slices of the fp32 masters and of the optimizer's state
    UniversalFiles   DeepSpeed's Universal Checkpoint: a folder for each parameter
    PlainFiles       a state_dict, safetensors, a Hugging Face directory: weights alone

Tensors are mapped, so only what is asked for is read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megamoe.checkpoint import manifest
from megamoe.checkpoint.plain_files import PlainFiles
from megamoe.checkpoint.unpickle import safe_load
from megamoe.config import ModelConfig
from megamoe.errors import UserError, shown
from megamoe.json_files import read_json
from megamoe.model.costs import parameter_shapes
from megamoe.model.names import engine_name, expert_id, is_buffer, layer_id, plain_name, same_expert_of_first_rank
from megamoe.optimizers import MASTERS
from megamoe.topology import ExpertTopology

MAIN_FILE = "mp_rank_00_model_states.pt"
RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
STATE_DICT_ENDINGS = (".pt", ".pth", ".bin")


class Source(Protocol):
    """A model's weights, and where `has_optimizer` its training state, by plain names."""

    has_optimizer: bool
    state_names: tuple[str, ...]  # of the optimizer's state tensors that it holds; none before the first applied step
    shapes: dict[str, tuple[int, ...]]
    buffers: dict[str, Tensor]

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """`count` values of a flattened parameter from `start` on, (count,), often a view of a mapped file; `kind` is
        MASTERS or one of `state_names`."""

    def training_state(self) -> dict[str, Any]:
        """Of a source with optimizer: step counts, schedule, loss scale; optimizer_step is None where the optimizer
        counts none, or has applied none."""


class _Slice(NamedTuple):
    """A stretch of one parameter in one rank's file."""

    rank: int
    group: int  # of the optimizer
    offset: int  # in the rank's flat partition of that group
    length: int


class RankFiles:
    """A checkpoint of DeepSpeed under ZeRO-1 or ZeRO-2, native MoE layers included."""

    has_optimizer = True

    def __init__(self, folder: Path, open_files: int | None = None):
        """
        Args:
            open_files: most ranks' files to keep mapped at a time; by default all.

        Raises UserError if a rank's file is missing, damaged, or is not of the same checkpoint as the others.
        """
        self._folder = folder
        self._main = safe_load(folder / MAIN_FILE)
        self._files = {int(match[1]): path for path in folder.iterdir() if (match := RANK_FILE.fullmatch(path.name))}
        self._open: Callable[[int], dict[str, Any]] = lru_cache(open_files)(self._open_rank)
        first = self._open(0)
        self._refuse_other_layouts(first)
        topology = ExpertTopology.from_partitions(self._main["num_experts"][0], first["partition_count"], rank=0)
        self.world_size, self.ep_size = topology.world_size, topology.ep_size
        self.zero_stage = int(first["zero_stage"])
        self.state_names = self._state_names(first)
        self._slices: dict[str, list[_Slice]] = {}
        for rank in range(self.world_size):
            self._index(rank, replace(topology, rank=rank).first_expert)
        first_rank = {
            plain_name(name): tuple(shape) for group in self._main["param_shapes"] for name, shape in group.items()
        }
        self.shapes = {
            name: first_rank[same_expert_of_first_rank(name, topology.experts_per_rank)] for name in self._slices
        }
        self.shapes.update({name: shape for name, shape in first_rank.items() if math.prod(shape) == 0})
        self.buffers = _buffers(self._main)
        for name, slices in self._slices.items():
            count = sum(piece.length for piece in slices)
            if count != math.prod(self.shapes[name]):
                raise UserError(
                    f"{folder} holds {count:,} of the {math.prod(self.shapes[name]):,} values of {name}; its files are "
                    "not all of one checkpoint: use an older one."
                )

    def _refuse_other_layouts(self, first: dict[str, Any]) -> None:
        zero = self._main["ds_config"].get("zero_optimization", {})
        for key in ("round_robin_gradients", "elastic_checkpoint"):
            if zero.get(key):
                raise UserError(
                    f"{self._folder} was saved with zero_optimization.{key}, where DeepSpeed does not say which values "
                    "are whose; save it again without."
                )
        if "single_partition_of_fp32_groups" not in first:
            raise UserError(
                f"{self._folder} was saved by another optimizer than that of ZeRO-1 and ZeRO-2, as with ZeRO-1, bf16 "
                'and data_types.grad_accum_dtype "fp32" together; save it again with ZeRO-2.'
            )

    def _state_names(self, first: dict[str, Any]) -> tuple[str, ...]:
        state = first["base_optimizer_state"]["state"].get(0, {})
        masters = first["single_partition_of_fp32_groups"][0]
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}
        for name, value in tensors.items():
            if value.dim() != 1 or value.numel() < masters.numel():  # masters are saved without their padding
                raise UserError(
                    f"{self._folder} holds the optimizer's {name} as {tuple(value.shape)}, not split over the ranks as "
                    "the fp32 masters are; such a checkpoint cannot be read: give one of another optimizer."
                )
        return tuple(tensors)

    def _open_rank(self, rank: int) -> dict[str, Any]:
        if rank not in self._files:
            raise UserError(
                f"{self._folder} has no zero_pp_rank_{rank}_mp_rank_00_optim_states.pt, the file of rank {rank}; "
                "bring it back, or use an older checkpoint."
            )
        return safe_load(self._files[rank])["optimizer_state_dict"]

    def _index(self, rank: int, first_expert: int) -> None:
        for group, addresses in enumerate(self._open(rank)["param_slice_mappings"]):
            for name, address in addresses.items():
                if not re.fullmatch(r"[\w.]+", name):  # it may become the name of a folder
                    raise UserError(f"{self._files[rank]} has a parameter called {name!r}, which is no name of one.")
                # Ranks that share a parameter hold its stretches in their own order.
                slices = self._slices.setdefault(plain_name(name, first_expert), [])
                slices.append(_Slice(rank, group, address.start, address.numel))

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        parts, position = [], 0
        for piece in self._slices.get(name, ()):
            first, last = max(start - position, 0), min(start + count - position, piece.length)
            if first < last:
                parts.append(self._flat(piece, kind)[piece.offset + first : piece.offset + last])
            position += piece.length
        return (parts[0] if len(parts) == 1 else torch.cat([torch.empty(0), *parts])).float()

    def _flat(self, piece: _Slice, kind: str) -> Tensor:
        state = self._open(piece.rank)
        if kind == MASTERS:
            return state["single_partition_of_fp32_groups"][piece.group]
        return state["base_optimizer_state"]["state"][piece.group][kind]

    def training_state(self) -> dict[str, Any]:
        first = self._open(0)
        return {
            **_counters(self._main),
            "optimizer_step": first["base_optimizer_state"]["state"].get(0, {}).get("step"),
            "loss_scaler": first["loss_scaler"],
        }

    def common_optimizer_state(self) -> dict[str, Any]:
        """What a Universal Checkpoint keeps once for all parameters."""
        first = self._open(0)
        sliced = ("base_optimizer_state", "param_slice_mappings", "single_partition_of_fp32_groups")
        common = {key: value for key, value in first.items() if key not in sliced}
        return {**common, "param_groups": first["base_optimizer_state"]["param_groups"]}


class UniversalFiles:
    """DeepSpeed's Universal Checkpoint, expert ids being those of the model."""

    has_optimizer = True

    def __init__(self, folder: Path):
        """Raises UserError if a file is missing or damaged."""
        self._folder = folder
        self._main = safe_load(folder / MAIN_FILE)
        self._optimizer = safe_load(folder / "zero" / "optimizer_state.pt")
        names = [path.name for path in sorted((folder / "zero").iterdir()) if path.is_dir()]
        self.shapes = {
            plain_name(name): tuple(safe_load(folder / "zero" / name / f"{MASTERS}.pt")["param"].shape)
            for name in names
        }
        kinds = {path.stem for path in (folder / "zero" / names[0]).glob("*.pt")}
        self.state_names = tuple(sorted(kinds - {MASTERS, "step"}))
        self.buffers = _buffers(self._main)

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        file = self._folder / "zero" / engine_name(name) / f"{kind}.pt"
        return safe_load(file)["param"].flatten()[start : start + count].float()

    def training_state(self) -> dict[str, Any]:
        step = self._folder / "zero" / engine_name(next(iter(self.shapes))) / "step.pt"
        return {
            **_counters(self._main),
            "optimizer_step": safe_load(step) if step.is_file() else None,
            "loss_scaler": self._optimizer["loss_scaler"],
        }


def _buffers(main: dict[str, Any]) -> dict[str, Tensor]:
    return {plain_name(name): tensor for name, tensor in main["module"].items() if is_buffer(name)}


def _counters(main: dict[str, Any]) -> dict[str, Any]:
    return {key: main[key] for key in ("global_steps", "global_samples", "skipped_steps", "lr_scheduler")}


# --- finding --------------------------------------------------------------------------------------------------------


def open_source(path: Path, open_files: int | None = None) -> Source:
    """Open a checkpoint folder, a file of plain weights, or a folder of them. Its bytes are not verified here.

    Raises UserError if it is none of these or cannot be read.
    """
    if path.is_file() and path.suffix in (".safetensors", *STATE_DICT_ENDINGS):
        return PlainFiles([path])
    try:
        if (path / "zero").is_dir():
            return UniversalFiles(path)
        if (path / MAIN_FILE).is_file():
            return RankFiles(path, open_files)
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{path} is not laid out as DeepSpeed lays out a checkpoint with experts ({error!r}); give another."
        ) from None
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := sorted(file for file in path.glob(pattern) if file.is_file()):
            return PlainFiles(_indexed(path, files))
    raise UserError(
        f"{path} holds no checkpoint and no weights; give a run folder, a checkpoint in it, a .pt or .safetensors "
        "file, or a Hugging Face directory."
    )


def _indexed(folder: Path, files: list[Path]) -> list[Path]:
    """The files that the index names, where there is one. Raises UserError if one is missing or not in the folder."""
    for index in folder.glob("*.index.json"):
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
    return files


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint in the run folder `path` of which every byte is what was saved, or `path` if it is one.

    Says in a line which newer ones were passed over. Raises UserError if none is verified.
    """
    found = manifest.found_at(path)
    for checkpoint in found:
        problems = manifest.problems(checkpoint)
        if not problems:
            return checkpoint
        if len(found) == 1:
            raise UserError(*problems)
        print(manifest.passed_over(checkpoint, problems), flush=True)
    raise UserError(f"every checkpoint in {path} is damaged, as the lines above say; use another run folder.")


def model_problems(source: Source, config: ModelConfig, where: str) -> list[str]:
    """What keeps the parameters in `source` from being those of a model of `config`, a sentence for each field."""
    problems: dict[str, str] = {}
    expected = parameter_shapes(config)
    for name, shape in expected.items():
        found = source.shapes.get(name)
        if found is None:
            continue
        if len(found) != len(shape):
            problems.setdefault(name, f"{where}: {name} has the shape {found}, not {tuple(shape.values())}.")
            continue
        for (field, size), other in zip(shape.items(), found, strict=True):
            if size != other:
                problems.setdefault(field, f"{where} was made with {field} {other}, not {size}; use the same preset.")
    for field, id_of in (("num_hidden_layers", layer_id), ("num_local_experts", expert_id)):
        ids = {id_of(name) for name in source.shapes} - {None}
        if len(ids) != getattr(config, field):
            problems.setdefault(
                field, f"{where} was made with {field} {len(ids)}, not {getattr(config, field)}; use the same preset."
            )
    if not problems:
        strangers = [*(expected.keys() - source.shapes.keys()), *(source.shapes.keys() - expected.keys())]
        for name in sorted(strangers)[:1]:
            what = "lacks" if name in expected else "has, beyond the model,"
            problems[name] = f"{where} {what} {name}; it is of another architecture."
    return list(problems.values())


# --- into a model ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_buffers(model: nn.Module, source: Source) -> None:
    """Give a model, or a rank's part of one, the router statistics in `source`."""
    for name, buffer in model.named_buffers():
        if plain_name(name) in source.buffers:
            buffer.copy_(source.buffers[plain_name(name)])


@torch.no_grad()
def load_weights(model: nn.Module, source: Source, dtype: torch.dtype) -> None:
    """Give a whole model (ep_size 1) the weights in `source`, in `dtype`, and the router statistics, in fp32."""
    for name, parameter in model.named_parameters():
        values = source.read(plain_name(name), MASTERS, 0, parameter.numel())
        parameter.data = values.view_as(parameter).to(dtype, copy=True)  # not the mapped file
    load_buffers(model, source)
