"""Write DeepSpeed's Universal Checkpoint, optimizer included: a bridge from a checkpoint to DeepSpeed's own loader."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from megamoe.checkpoint import manifest
from megamoe.checkpoint.deepspeed_files import MAIN_FILE, RankFiles
from megamoe.checkpoint.export import output
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.errors import UserError
from megamoe.model.names import engine_name
from megamoe.optimizers import MASTERS


def write_universal(source: IndexedFiles | RankFiles, run: dict[str, Any], out: Path) -> None:
    """DeepSpeed's Universal Checkpoint of a checkpoint, as `out`, with a manifest. Raises UserError.

    Expert ids in its names are those of the model, so DeepSpeed's own loader can use it at an ep_size of 1. At a larger
    one it would look on every rank for experts 0 to E / ep_size - 1 by those names, since a native MoE layer names them
    from 0 on each rank; megamoe's loader finds the right ones.

    Args:
        run: the record of the run.
    """
    if not source.state_names:
        raise UserError(
            f"{source.folder} was saved before a step was applied, so there is nothing to reshard; resume it."
        )
    training = source.training_state()
    step = training["optimizer_step"]
    with output(out) as partial:
        files: dict[str, manifest.FileRecord] = {}

        def save(name: str, value: Any) -> None:
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(value, path)
            files[name] = manifest.file_record(path)

        for name, shape in source.shapes.items():
            folder = f"zero/{engine_name(name)}"
            for kind in (MASTERS, *source.state_names):
                # A copy: of a view, torch.save would write all that it looks into.
                values = source.read(name, kind, 0, math.prod(shape)).view(shape).clone()
                save(f"{folder}/{kind}.pt", {"param": values})
            if step is not None:
                save(f"{folder}/step.pt", step)
        save("zero/optimizer_state.pt", _optimizer_state(source, training, run))
        save(MAIN_FILE, _main_state(source, training, run))
        (partial / "run.json").write_text(json.dumps(run, indent=2))
        files["run.json"] = manifest.file_record(partial / "run.json")
        manifest.seal(partial, {"step": training["global_steps"], "layout": "universal"}, files)


def _optimizer_state(source: IndexedFiles | RankFiles, training: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed keeps once for all parameters (`DeepSpeedZeroOptimizer._load_global_state`, and its groups)."""
    fields = training["loss_scaler"]
    dynamic = bool(fields.get("dynamic"))
    scaler = DynamicLossScaler.__new__(DynamicLossScaler) if dynamic else LossScaler()
    vars(scaler).update(fields, **({"dtype": torch.half} if dynamic else {}))
    return {
        "loss_scaler": scaler,
        "dynamic_loss_scale": dynamic,
        "overflow": False,
        "clip_grad": run.get("deepspeed", {}).get("gradient_clipping", 0.0),
        "zero_stage": source.zero_stage,
        "ds_version": deepspeed.__version__,  # whose layout this is
        "param_groups": [
            {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
            for group in training["groups"]
        ],
    }


def _main_state(source: IndexedFiles | RankFiles, training: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's loader reads of the main file, the parameters having folders of their own."""
    groups = training["groups"]
    return {
        "module": {engine_name(name): tensor for name, tensor in source.buffers.items()},
        "optimizer": None,
        "lr_scheduler": {
            **training["lr_scheduler"],
            "_last_lr": [group["lr"] for group in groups],
            "lr_lambdas": [None] * len(groups),
        },
        **{key: training[key] for key in ("global_steps", "global_samples", "skipped_steps")},
        "dp_world_size": source.world_size,
        "mp_world_size": 1,
        "ds_config": run.get("deepspeed"),
        "ds_version": deepspeed.__version__,
    }
