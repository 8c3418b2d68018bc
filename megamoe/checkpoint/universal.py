"""Write DeepSpeed's Universal Checkpoint, optimizer included: a bridge from a checkpoint to DeepSpeed's own loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import EP_IS_EXPERT_PARAM, EP_NUM_EXPERTS
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from megamoe.checkpoint import manifest
from megamoe.checkpoint.deepspeed_files import MAIN_FILE, RankFiles
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.config.optimizers import MASTERS
from megamoe.formats.export import output
from megamoe.model.names import Part, engine_name, engine_parameters, engine_shape, is_engine_expert
from megamoe.utils.errors import UserError


def write_universal(source: IndexedFiles | RankFiles, run: dict[str, Any], out: Path) -> None:
    """DeepSpeed's Universal Checkpoint of a checkpoint, as `out`, with a manifest. Raises UserError.

    There is a folder for each of the engine's parameters. One of experts holds all experts of its layer, (E, rows,
    columns), with the marks by which DeepSpeed's own loader gives each rank its own, at any ep_size.

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

        parameters = engine_parameters(source.shapes)
        for name, parts in parameters.items():
            for kind in (MASTERS, *source.state_of(parts[0].name)):
                save(f"zero/{name}/{kind}.pt", _parameter(source, name, parts, kind))
            if step is not None:
                save(f"zero/{name}/step.pt", step)
        groups = _groups(training, len(parameters))
        save("zero/optimizer_state.pt", _optimizer_state(source, training, groups, run))
        save(MAIN_FILE, _main_state(source, training, groups, run))
        (partial / "run.json").write_text(json.dumps(run, indent=2))
        files["run.json"] = manifest.file_record(partial / "run.json")
        manifest.seal(partial, {"step": training["global_steps"], "layout": "universal"}, files)


def _parameter(source: IndexedFiles | RankFiles, name: str, parts: list[Part], kind: str) -> dict[str, Any]:
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
    source: IndexedFiles | RankFiles, training: dict[str, Any], groups: list[dict[str, Any]], run: dict[str, Any]
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
        "zero_stage": source.zero_stage,
        "ds_version": deepspeed.__version__,  # whose layout this is
        "param_groups": groups,
    }


def _main_state(
    source: IndexedFiles | RankFiles, training: dict[str, Any], groups: list[dict[str, Any]], run: dict[str, Any]
) -> dict[str, Any]:
    """What DeepSpeed's loader reads of the main file, the parameters having folders of their own."""
    return {
        "module": {engine_name(name): tensor for name, tensor in source.buffers.items()},
        "optimizer": None,
        "lr_scheduler": {
            **{key: training["lr_scheduler"][key] for key in ("last_epoch", "_step_count")},
            "_last_lr": [group["lr"] for group in groups],
            "lr_lambdas": [],  # the engine keeps its own
        },
        **{key: training[key] for key in ("global_steps", "global_samples", "skipped_steps")},
        "dp_world_size": source.world_size,
        "mp_world_size": 1,
        "ds_config": run.get("deepspeed"),
        "ds_version": deepspeed.__version__,
    }
