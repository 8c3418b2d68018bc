"""What a run starts from, and what may change when it resumes, by the records of both."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megamoe.checkpoint import folders
from megamoe.config.model import ModelConfig
from megamoe.config.run import RampStage, RunConfig
from megamoe.data.ledger import DataLedger, read_ledger
from megamoe.data.ramp import BatchRamp
from megamoe.utils.errors import Problems, UserError, shown
from megamoe.utils.run_folder import RunFolder

# A run may continue only with what decides its losses unchanged. Ranks, ep_size, ZeRO stage and the split of a step's
# samples over ranks and micro-batches do not.
SAME_ON_RESUME = ("model", "optimization", "seed", "seq_len", "samples_per_step", "data", "tokenizer_sha256")
OPTIMIZATION = (
    "optimizer", "scheduler", "gradient_clipping", "bf16", "fp16", "data_types", "communication_data_type",
    "prescale_gradients", "gradient_predivide_factor",
)  # fmt: skip
PEAKS = ("lr", "adam_lr", "muon_lr")  # learning rates in optimizer.params


@dataclass
class Start:
    """What a run starts from. The leading rank finds it; that of the others is empty."""

    folder: RunFolder | None = None  # locked
    is_resuming: bool = False
    candidates: list[Path] = field(default_factory=list)  # checkpoints to resume from, in the order to try them
    initial_weights: list[Path] = field(default_factory=list)  # where there are none, in the order to try them
    ledger: DataLedger = field(default_factory=DataLedger)

    def data_steps(self) -> int:
        """Steps whose data the run has read, also those before it went back to an earlier checkpoint."""
        newest = max((folders.step_of(path) or 0 for path in self.candidates), default=0)
        return self.ledger.data_step(newest + 1) - 1


@dataclass(frozen=True)
class Changes:
    """What a resume changes."""

    schedule: dict[str, Any] | None = None
    ramp_step: int | None = None  # the first step that has another number of samples
    ema_decay_before: float | None = None

    def lines(self, step: int) -> list[str]:
        """What the log says of them after step `step`."""
        lines = []
        if self.schedule:
            lines.append(f"the schedule changes after step {step}: {json.dumps(self.schedule)}")
        if self.ramp_step:
            lines.append(f"the batch ramp changes with step {self.ramp_step}")
        return lines


# --- the start ------------------------------------------------------------------------------------------------------


def find_start(run: RunConfig, problems: Problems) -> Start:
    """Lock the run folder, and look for what the run resumes or starts from; what is wrong is added to `problems`."""
    folder: RunFolder | None = problems.attempt(RunFolder, run.folder, run.auto_resume)
    if folder is None:
        return Start()
    ledger: DataLedger = problems.attempt(read_ledger, run.folder) or DataLedger()
    is_resuming = run.resume or (run.auto_resume and folder.began is not None)
    found = folders.run_checkpoints(folder.checkpoints, ledger) if is_resuming else []
    candidates = found if any(map(folders.is_complete, found)) else []
    weights = folders.found_at(Path(run.init_from)) if run.init_from and not candidates else []
    start = Start(folder, is_resuming, candidates, weights, ledger)
    problems += _folder_problems(run, folder, start)
    return start


def _folder_problems(run: RunConfig, folder: RunFolder, start: Start) -> list[str]:
    if run.resume and folder.began is None:
        return [f"{run.folder} holds no run to resume; check --run_dir or leave --resume out."]
    if run.resume and not start.candidates:
        return [
            f"{run.folder} holds no complete checkpoint to resume from; give --auto_resume alone, which then begins "
            "at step 0, or choose another --run_dir."
        ]
    if folder.began is not None and not start.is_resuming:
        return [f"{run.folder} holds another run; choose another --run_dir, or continue it with --resume."]
    if folder.is_foreign():
        return [f"{run.folder} exists already and holds no run; choose another --run_dir."]
    files = [parent for parent in run.folder.parents if parent.exists() and not parent.is_dir()]
    return [f"{run.folder} cannot be made, since {file} is a file; choose another --run_dir." for file in files]


# --- what may change ------------------------------------------------------------------------------------------------


def check_changes(run: RunConfig, start: Start, record: dict[str, Any], ramp: BatchRamp) -> Changes:
    """What the run with this record changes of the one in its folder. Raises UserError where it would have other
    losses."""
    if not start.folder or start.folder.began is None:
        return Changes()
    last = start.folder.last_record()
    started_from = start.folder.began.get("run", {}).get("init_from")
    # Once there is a checkpoint it may be left out.
    if started_from != run.init_from and (run.init_from or not start.candidates):
        raise UserError(
            f"{run.folder} was started with init_from {json.dumps(started_from)}, not {json.dumps(run.init_from)}; "
            "give the same again, or choose another --run_dir."
        )
    before, now = _decisive(last), _decisive(record)
    changed = [key for key in now if before.get(key) != now[key]]
    schedule = None
    if run.resume and "optimization" in changed:
        others = _part(now["optimization"], before["optimization"])
        if others.keys() <= {"scheduler"}:  # a longer run, or another decay: the optimizer's state fits still
            schedule = _new_schedule(now["optimization"]["scheduler"], before["optimization"]["scheduler"])
            changed.remove("optimization")
    problems = [
        f"{run.folder} holds a run with {key} {json.dumps(_part(before.get(key), now[key]))}, "
        f"not {json.dumps(_part(now[key], before.get(key)))}; {_remedy(key, before, now)}."
        for key in changed
    ]
    ramp_before = BatchRamp(record["samples_per_step"], stages_of(last.get("run", {})))
    ramp_step = ramp_before.first_difference(ramp)
    problems += _ramp_problems(run, ramp_before, ramp, ramp_step, start.data_steps())
    if problems:
        raise UserError(*problems)
    return Changes(schedule, ramp_step, last.get("run", {}).get("ema_decay"))


def _ramp_problems(run: RunConfig, before: BatchRamp, now: BatchRamp, step: int | None, taken: int) -> list[str]:
    """A changed ramp is for steps that no checkpoint has taken yet, and on --resume."""
    if step is None or (run.resume and step > taken):
        return []
    way = f"give --resume to change step {step}" if step > taken else "resume with the same for those"
    return [
        f"{run.folder} holds a run with {before.samples_of(step)} samples in step {step} of its batch_ramp, not "
        f"{now.samples_of(step)}, and {taken} steps are taken; {way}, or choose another --run_dir."
    ]


def _decisive(record: dict[str, Any]) -> dict[str, Any]:
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


def _new_schedule(now: dict[str, Any], before: Any) -> dict[str, Any]:
    """What a log line says of a schedule that has changed: all of it if it is of another type, else what differs; what
    is no longer given is null."""
    if not isinstance(before, dict) or now.get("type") != before.get("type"):
        return now
    params = now.get("params", {})
    gone: dict[str, Any] = {key: None for key in before.get("params", {}) if key not in params}
    changes = _part(now, before)
    changed = {**changes.get("params", {}), **gone}
    return {**changes, **({"params": changed} if changed else {})}


def _remedy(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    if key == "optimization" and _part(now[key], before[key]).keys() == {"scheduler"}:
        return "give --resume to continue with the new schedule"
    if key == "samples_per_step":
        return (
            f'set "train_batch_size" to {before.get(key)} in the DeepSpeed JSON and leave '
            '"gradient_accumulation_steps" out, so that any number of ranks shares them'
        )
    return "resume with the same, or choose another --run_dir"


def _part(value: Any, other: Any) -> Any:
    """Of an object, what differs from `other`; of anything else, all."""
    if not isinstance(value, dict) or not isinstance(other, dict):
        return value
    return {key: _part(inner, other.get(key)) for key, inner in value.items() if inner != other.get(key)}


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
