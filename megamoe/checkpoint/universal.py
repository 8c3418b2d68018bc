"""DeepSpeed's Universal Checkpoint, optimizer included: a folder for each of the engine's parameters.

The bridge to DeepSpeed's own loader. `manifest.json` has the size and SHA-256 of each file; one that DeepSpeed itself
has written has none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.checkpoint.constants import EP_IS_EXPERT_PARAM, EP_NUM_EXPERTS
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from pydantic import ValidationError
from torch import Tensor

from megamoe.checkpoint import folders
from megamoe.checkpoint.index import FileRecord
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.checkpoint.slice_file import Record
from megamoe.config.optimizers import MASTERS
from megamoe.formats.unpickle import safe_load
from megamoe.model.names import (
    Part,
    engine_name,
    engine_parameters,
    engine_shape,
    is_buffer,
    is_engine_expert,
    plain_name,
    plain_parts,
)
from megamoe.utils import disk
from megamoe.utils.disk import file_sha256
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import read_json

MAIN_FILE = "mp_rank_00_model_states.pt"
OPTIMIZER_FILE = "zero/optimizer_state.pt"
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class Manifest(Record):
    """What a Universal Checkpoint of megamoe's says about itself."""

    step: int
    layout: Literal["universal"]
    files: dict[str, FileRecord]
    """By name relative to the checkpoint."""


# --- reading --------------------------------------------------------------------------------------------------------


class UniversalFiles:
    """The state in a Universal Checkpoint. All experts of a layer are in one folder."""

    has_optimizer = True

    def __init__(self, folder: Path):
        """Raises UserError if a file is missing or damaged."""
        self.folder = folder
        self._main = safe_load(folder / MAIN_FILE)
        self._optimizer = safe_load(folder / OPTIMIZER_FILE)
        names = [path.name for path in sorted((folder / "zero").iterdir()) if path.is_dir()]
        # Experts of a layer, which come one after the other, are in one file.
        self._parameter: Callable[[str, str], Tensor] = lru_cache(1)(
            lambda name, kind: safe_load(folder / "zero" / name / f"{kind}.pt")["param"]
        )
        self._parts: dict[str, tuple[str, Part]] = {}  # by plain name, with the folder that it is in
        for name in names:
            shape = tuple(self._parameter(name, MASTERS).shape)
            self._parts.update((part.name, (name, part)) for part in plain_parts(name, shape))
        self.shapes = {name: part.shape for name, (_, part) in self._parts.items()}
        self._kinds = {name: {path.stem for path in (folder / "zero" / name).glob("*.pt")} for name in names}
        self.state_names = _state_names(set.union(*self._kinds.values()))
        module = self._main["module"]
        self.buffers = {plain_name(name): tensor for name, tensor in module.items() if is_buffer(name)}

    def state_of(self, name: str) -> tuple[str, ...]:
        return _state_names(self._kinds[self._parts[name][0]])

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        folder, part = self._parts[name]
        return self._parameter(folder, kind).flatten()[part.start + start : part.start + start + count].float()

    def training_state(self) -> dict[str, Any]:
        folder, _ = next(iter(self._parts.values()))
        step = self.folder / "zero" / folder / "step.pt"
        scaler = vars(self._optimizer["loss_scaler"])
        return {
            **{key: self._main[key] for key in (*COUNTERS, "lr_scheduler")},
            "optimizer_step": safe_load(step) if step.is_file() else None,
            "loss_scaler": {name: value for name, value in scaler.items() if isinstance(value, (bool, int, float))},
        }


def _state_names(files: set[str]) -> tuple[str, ...]:
    return tuple(sorted(files - {MASTERS, "step"}))


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises UserError if it is malformed, or of another step than the name of its folder."""
    path = checkpoint / folders.MANIFEST
    try:
        manifest = Manifest.model_validate(read_json(path))
    except ValidationError:
        raise UserError(f"{path} does not list its files with bytes and sha256; use an older checkpoint.") from None
    if folders.step_of(checkpoint) not in (None, manifest.step):
        raise UserError(
            f"{path} is of step {manifest.step}, but its folder is called {checkpoint.name}; use an older checkpoint."
        )
    return manifest


# --- writing --------------------------------------------------------------------------------------------------------


def write_universal(source: IndexedFiles, run: dict[str, Any], out: Path) -> None:
    """DeepSpeed's Universal Checkpoint of a checkpoint, as `out`, with a manifest. Raises UserError.

    One folder of experts holds all experts of its layer, (E, rows, columns), with the marks by which DeepSpeed's own
    loader gives each rank its own, at any ep_size.

    Args:
        run: the record of the run.
    """
    if not source.state_names:
        raise UserError(
            f"{source.folder} was saved before a step was applied, so there is nothing to reshard; resume it."
        )
    training = source.training_state()
    step = training["optimizer_step"]
    with disk.output(out) as partial:

        def save(name: str, value: Any) -> None:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(value, partial / name)

        parameters = engine_parameters(source.shapes)
        for name, parts in parameters.items():
            for kind in (MASTERS, *source.state_of(parts[0].name)):
                save(f"zero/{name}/{kind}.pt", _parameter(source, name, parts, kind))
            if step is not None:
                save(f"zero/{name}/step.pt", step)
        groups = _groups(training, len(parameters))
        save(OPTIMIZER_FILE, _optimizer_state(source, training, groups, run))
        save(MAIN_FILE, _main_state(source, training, groups, run))
        (partial / "run.json").write_text(json.dumps(run, indent=2))
        _write_manifest(partial, training["global_steps"])


def _write_manifest(folder: Path, step: int) -> None:
    files = {
        str(path.relative_to(folder)): FileRecord(bytes=path.stat().st_size, sha256=file_sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = Manifest(step=step, layout="universal", files=files)
    disk.write_file(folder / folders.MANIFEST, manifest.model_dump_json(exclude_defaults=True, indent=1).encode())


def _parameter(source: IndexedFiles, name: str, parts: list[Part], kind: str) -> dict[str, Any]:
    """What DeepSpeed's `load_hp_checkpoint_state` reads of one of the engine's parameters."""
    shape = engine_shape(name, parts)
    values = torch.empty(shape)
    for part in parts:
        values.view(-1)[part.start : part.start + part.count] = source.read(part.name, kind, 0, part.count)
    marks = {EP_IS_EXPERT_PARAM: True, EP_NUM_EXPERTS: shape[0]} if is_engine_expert(name) else {}
    return {"param": values, **marks}


def _groups(training: dict[str, Any], num_parameters: int) -> list[dict[str, Any]]:
    """Settings of the optimizer's groups, by place, as many as any engine has.

    DeepSpeed's loader leaves a group of the engine without settings here as it is, weights and all. At a smaller
    ep_size a rank has more experts, and perhaps more groups of them, though never more than parameters.
    """
    groups = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in group.items() if key != "name"}
        for group in training["groups"]  # the name of one of experts has the ep_size in it
    ]
    return groups + [groups[-1]] * (num_parameters - len(groups))


def _optimizer_state(
    source: IndexedFiles, training: dict[str, Any], groups: list[dict[str, Any]], run: dict[str, Any]
) -> dict[str, Any]:
    """What DeepSpeed keeps once for all parameters (`DeepSpeedZeroOptimizer._load_global_state`, and its groups)."""
    fields = training["loss_scaler"]
    dynamic = bool(fields.get("dynamic"))
    scaler = DynamicLossScaler.__new__(DynamicLossScaler) if dynamic else LossScaler()
    vars(scaler).update(fields, **({"dtype": torch.half} if dynamic else {}))
    clipping = run.get("deepspeed", {}).get("gradient_clipping")
    return {
        "loss_scaler": scaler,
        "dynamic_loss_scale": dynamic,
        "overflow": False,
        **({} if clipping is None else {"clip_grad": clipping}),  # else the engine keeps its own
        "zero_stage": source.index.topology.zero_stage,
        "ds_version": deepspeed.__version__,  # whose layout this is
        "param_groups": groups,
    }


def _main_state(
    source: IndexedFiles, training: dict[str, Any], groups: list[dict[str, Any]], run: dict[str, Any]
) -> dict[str, Any]:
    """What DeepSpeed's loader reads of the main file, the parameters having folders of their own."""
    return {
        "module": {engine_name(name): tensor for name, tensor in source.buffers.items()},
        "optimizer": None,
        "lr_scheduler": {
            **training["lr_scheduler"],
            "_last_lr": [group["lr"] for group in groups],
            "lr_lambdas": [],  # the engine keeps its own
        },
        **{key: training[key] for key in COUNTERS},
        "dp_world_size": source.index.topology.world_size,
        "mp_world_size": 1,
        "ds_config": run.get("deepspeed"),
        "ds_version": deepspeed.__version__,
    }
