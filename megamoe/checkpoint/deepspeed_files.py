"""Read what DeepSpeed saves: the files of its ranks, and its Universal Checkpoint.

megamoe saved in the first form before it had its own, and `tools/reshard_checkpoint.py` writes the second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamoe.config.optimizers import MASTERS
from megamoe.formats.unpickle import safe_load
from megamoe.model.names import Part, is_buffer, plain_name, plain_parts, same_expert_of_first_rank
from megamoe.model.topology import ExpertTopology
from megamoe.utils.errors import UserError

MAIN_FILE = "mp_rank_00_model_states.pt"
RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


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
        self.folder = folder
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
                    f"{self.folder} was saved with zero_optimization.{key}, where DeepSpeed does not say which values "
                    "are whose; save it again without."
                )
        if "single_partition_of_fp32_groups" not in first:
            raise UserError(
                f"{self.folder} was saved by another optimizer than that of ZeRO-1 and ZeRO-2, as with ZeRO-1, bf16 "
                'and data_types.grad_accum_dtype "fp32" together; save it again with ZeRO-2.'
            )

    def _state_names(self, first: dict[str, Any]) -> tuple[str, ...]:
        state = first["base_optimizer_state"]["state"].get(0, {})
        masters = first["single_partition_of_fp32_groups"][0]
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}
        for name, value in tensors.items():
            if value.dim() != 1 or value.numel() < masters.numel():  # masters are saved without their padding
                raise UserError(
                    f"{self.folder} holds the optimizer's {name} as {tuple(value.shape)}, not split over the ranks as "
                    "the fp32 masters are; such a checkpoint cannot be read: give one of another optimizer."
                )
        return tuple(tensors)

    def _open_rank(self, rank: int) -> dict[str, Any]:
        if rank not in self._files:
            raise UserError(
                f"{self.folder} has no zero_pp_rank_{rank}_mp_rank_00_optim_states.pt, the file of rank {rank}; "
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

    def state_of(self, name: str) -> tuple[str, ...]:
        return self.state_names

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
            "loss_scaler": scaler_fields(first["loss_scaler"]),
            "groups": [
                {key: value for key, value in group.items() if key != "params"}
                for group in first["base_optimizer_state"]["param_groups"]
            ],
        }


class UniversalFiles:
    """DeepSpeed's Universal Checkpoint: all experts of a layer in one folder, or each in its own, by their ids in the
    model."""

    has_optimizer = True

    def __init__(self, folder: Path):
        """Raises UserError if a file is missing or damaged."""
        self.folder = folder
        self._main = safe_load(folder / MAIN_FILE)
        self._optimizer = safe_load(folder / "zero" / "optimizer_state.pt")
        names = [path.name for path in sorted((folder / "zero").iterdir()) if path.is_dir()]
        # Experts of a layer, which come one after the other, are in one file.
        self._parameter: Callable[[str, str], Tensor] = lru_cache(1)(self._open_parameter)
        self._parts: dict[str, tuple[str, Part]] = {}  # by plain name, with the folder that it is in
        for name in names:
            shape = tuple(self._parameter(name, MASTERS).shape)
            self._parts.update((part.name, (name, part)) for part in plain_parts(name, shape))
        self.shapes = {name: part.shape for name, (_, part) in self._parts.items()}
        self._kinds = {name: {path.stem for path in (folder / "zero" / name).glob("*.pt")} for name in names}
        self.state_names = _state_names(set.union(*self._kinds.values()))
        self.buffers = _buffers(self._main)

    def _open_parameter(self, name: str, kind: str) -> Tensor:
        return safe_load(self.folder / "zero" / name / f"{kind}.pt")["param"]

    def state_of(self, name: str) -> tuple[str, ...]:
        return _state_names(self._kinds[self._parts[name][0]])

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        folder, part = self._parts[name]
        return self._parameter(folder, kind).flatten()[part.start + start : part.start + start + count].float()

    def training_state(self) -> dict[str, Any]:
        folder, _ = next(iter(self._parts.values()))
        step = self.folder / "zero" / folder / "step.pt"
        return {
            **_counters(self._main),
            "optimizer_step": safe_load(step) if step.is_file() else None,
            "loss_scaler": scaler_fields(self._optimizer["loss_scaler"]),
        }


def _state_names(files: set[str]) -> tuple[str, ...]:
    return tuple(sorted(files - {MASTERS, "step"}))


def _buffers(main: dict[str, Any]) -> dict[str, Tensor]:
    return {plain_name(name): tensor for name, tensor in main["module"].items() if is_buffer(name)}


def _counters(main: dict[str, Any]) -> dict[str, Any]:
    return {key: main[key] for key in ("global_steps", "global_samples", "skipped_steps", "lr_scheduler")}


def scaler_fields(scaler: Any) -> dict[str, Any]:
    """The numbers of DeepSpeed's loss scaler, by name."""
    return {name: value for name, value in vars(scaler).items() if isinstance(value, (bool, int, float))}
