"""What must be the same when a run resumes, and what may change: by the records of both."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError

from megamoe.config.model import ModelConfig
from megamoe.config.run import RampStage
from megamoe.utils.errors import UserError, shown

# A run may continue only with what decides its losses unchanged. Ranks, ep_size, ZeRO stage and the split of a step's
# samples over ranks and micro-batches do not.
SAME_ON_RESUME = ("model", "optimization", "seed", "seq_len", "samples_per_step", "data", "tokenizer_sha256")
OPTIMIZATION = (
    "optimizer", "scheduler", "gradient_clipping", "bf16", "fp16", "data_types", "communication_data_type",
    "prescale_gradients", "gradient_predivide_factor",
)  # fmt: skip
PEAKS = ("lr", "adam_lr", "muon_lr")  # learning rates in optimizer.params


def decisive(record: dict[str, Any]) -> dict[str, Any]:
    """Of a run's record, what decides its losses. Where a corpus lies does not; a field of the model that is newer than
    the record had its default."""
    optimization = _with_peaks_in_schedule({key: record.get("deepspeed", {}).get(key) for key in OPTIMIZATION})
    corpora = [corpus for corpus in record.get("data", []) if isinstance(corpus, dict)]
    data = [{key: corpus.get(key) for key in ("tokens", "weight")} for corpus in corpora]
    defaults = {name: field.default for name, field in ModelConfig.model_fields.items() if not field.is_required()}
    model = {"model": {**defaults, **record["model"]}} if "model" in record else {}
    return {key: {**record, **model, "optimization": optimization, "data": data}.get(key) for key in SAME_ON_RESUME}


def _with_peaks_in_schedule(optimization: dict[str, Any]) -> dict[str, Any]:
    """The same settings, with the optimizer's learning rates among those of the schedule, which may change."""
    optimizer, scheduler = optimization["optimizer"], optimization["scheduler"]
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    if not isinstance(params, dict) or not isinstance(scheduler, dict):
        return optimization
    peaks = {f"optimizer.params.{key}": params[key] for key in PEAKS if key in params}
    rest = {**optimizer, "params": {key: value for key, value in params.items() if key not in PEAKS}}
    return {**optimization, "optimizer": rest, "scheduler": {**scheduler, **peaks}}


def new_schedule(now: dict[str, Any], before: Any) -> dict[str, Any]:
    """What a log line says of a schedule that has changed: all of it if it is of another type, else what differs; what
    is no longer given is null."""
    if not isinstance(before, dict) or now.get("type") != before.get("type"):
        return now
    params = now.get("params", {})
    gone: dict[str, Any] = {key: None for key in before.get("params", {}) if key not in params}
    changes = part(now, before)
    changed = {**changes.get("params", {}), **gone}
    return {**changes, **({"params": changed} if changed else {})}


def remedy(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    if key == "optimization" and part(now[key], before[key]).keys() == {"scheduler"}:
        return "give --resume to continue with the new schedule"
    if key == "samples_per_step":
        return (
            f'set "train_batch_size" to {before.get(key)} in the DeepSpeed JSON and leave '
            '"gradient_accumulation_steps" out, so that any number of ranks shares them'
        )
    return "resume with the same, or choose another --run_dir"


def part(value: Any, other: Any) -> Any:
    """Of an object, what differs from `other`; of anything else, all."""
    if not isinstance(value, dict) or not isinstance(other, dict):
        return value
    return {key: part(inner, other.get(key)) for key, inner in value.items() if inner != other.get(key)}


def stages_of(run: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """The batch ramp in a run's options as recorded; runs before it had none. Raises UserError."""
    recorded = run.get("batch_ramp", [])
    try:
        stages = TypeAdapter(list[RampStage]).validate_python(recorded)
    except ValidationError:
        raise UserError(
            f"the record of the run has batch_ramp {shown(recorded)}, which no run has written; bring the file back."
        ) from None
    return tuple((stage.samples, stage.last_step) for stage in stages)
