"""What a run starts from, and what may change when it resumes, by the records of both."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamoe.checkpoint import folders
from megamoe.config.model import ModelConfig
from megamoe.config.run import RunConfig
from megamoe.data.ledger import DataLedger, read_ledger
from megamoe.utils.errors import Problems, UserError
from megamoe.utils.run_folder import RunFolder, last_record

# A run may continue only with what decides its losses unchanged. Ranks, ep_size, ZeRO stage and the split of a step's
# samples over ranks and micro-batches do not.
SAME_ON_RESUME = ("model", "optimization", "seed", "tokenizer_sha256")
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


@dataclass(frozen=True)
class Changes:
    """What a resume changes."""

    schedule: str | None = None  # from what to what
    phases: bool = False  # of data that lie ahead
    replaced: tuple[dict[str, Any], ...] = ()  # what was trained on and the phases of the record do not have
    ema_decay_before: float | None = None


# --- the start ------------------------------------------------------------------------------------------------------


def find_start(run: RunConfig, problems: Problems) -> Start:
    """Lock the run folder, and look for what the run resumes or starts from; what is wrong is added to `problems`."""
    folder: RunFolder | None = problems.attempt(RunFolder, run.folder, run.auto_resume, not run.dry_run)
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


def check_changes(run: RunConfig, start: Start, record: dict[str, Any]) -> Changes:
    """What the run with this record changes of the one in its folder. Raises UserError where it would have other
    losses."""
    if not start.folder or start.folder.began is None:
        return Changes()
    last = last_record(start.folder.path) or {}
    started_from = start.folder.began.get("run", {}).get("init_from")
    # Once there is a checkpoint it may be left out.
    if started_from != run.init_from and (run.init_from or not start.candidates):
        raise UserError(
            f"{run.folder} was started with init_from {json.dumps(started_from)}, not {json.dumps(run.init_from)}; "
            "give the same again, or choose another --run_dir."
        )
    before, now = _decisive(last), _decisive(record)
    changed = [key for key in now if before.get(key) != now[key]]
    if run.allow_changed_data and "tokenizer_sha256" in changed:
        changed.remove("tokenizer_sha256")
    schedule = None
    if run.resume and "optimization" in changed:
        ours = _part(now["optimization"], before["optimization"])
        theirs = _part(before["optimization"], now["optimization"])
        if ours.keys() == {"scheduler"}:  # a longer run, or another decay: the optimizer's state fits still
            schedule = f"from {json.dumps(theirs['scheduler'])} to {json.dumps(ours['scheduler'])}"
            changed.remove("optimization")
    problems = [
        f"{run.folder} holds a run with {key} {json.dumps(_part(before.get(key), now[key]))}, "
        f"not {json.dumps(_part(now[key], before.get(key)))}; {_remedy(key, before, now)}."
        for key in changed
    ]
    step = max((folders.step_of(path) or 0 for path in start.candidates), default=0)
    done = max(start.ledger.data_step(step), 1)
    problems += _data_problems(run, last, record, done)
    if problems:
        raise UserError(*problems)
    theirs, ours = _phases(last), _phases(record)
    replaced = tuple(last.get("replaced_data", ()))
    if run.allow_changed_data and _trained(theirs, done) != _trained(ours, done):
        replaced += ({"last_step": done, "phases": last["phases"]},)
    return Changes(schedule, theirs != ours, replaced, last.get("run", {}).get("ema_decay"))


def _phases(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a run's record, what decides which data its steps read. Where a corpus lies does not."""
    of_phase, of_source = ("seq_len", "samples_per_step"), ("weight", "fingerprint", "first_sample")
    try:
        return [
            {"first_step": int(phase["first_step"]), **{key: phase[key] for key in of_phase}}
            | {"data": [{key: source[key] for key in of_source} for source in phase["data"]]}
            for phase in record["phases"]
        ]
    except (KeyError, TypeError, ValueError):  # no record of ours
        return []


def _trained(phases: list[dict[str, Any]], done: int) -> list[dict[str, Any]]:
    """Those that steps up to `done` have read."""
    return [phase for phase in phases if phase["first_step"] <= done]


def _data_problems(run: RunConfig, last: dict[str, Any], record: dict[str, Any], done: int) -> list[str]:
    """What the run would read otherwise in the steps up to `done`, or without --resume in any."""
    before, now = _phases(last), _phases(record)
    if before == now or run.allow_changed_data:
        return []
    trained, again = _trained(before, done), _trained(now, done)
    if trained == again:
        if run.resume:
            return []
        return [f"{run.folder} holds a run with other data ahead of step {done}; give --resume to change it."]
    pairs = list(itertools.zip_longest(trained, again))
    number = next(n for n, (theirs, ours) in enumerate(pairs) if theirs != ours)
    theirs, ours = pairs[number]
    theirs, ours = _part(theirs, ours), _part(ours, theirs)
    remedy = "keep what is trained on: what lies ahead may change, by --data_schedule; or choose another --run_dir"
    schedule = last.get("run", {}).get("data_schedule")
    if schedule and not run.data_schedule:
        remedy = f"give --data_schedule {schedule} again, or choose another --run_dir"
    elif theirs and theirs.keys() == {"samples_per_step"}:
        remedy = (
            f'set "train_batch_size" to {theirs["samples_per_step"]} in the DeepSpeed JSON and leave '
            '"gradient_accumulation_steps" out, so that any number of ranks shares them'
        )
    elif theirs and theirs.keys() == {"data"}:
        remedy = "resume with the same, give --allow_changed_data, or choose another --run_dir"
    return [
        f"{run.folder} holds a run trained to step {done} whose phase {number + 1} has {json.dumps(theirs)}, not "
        f"{json.dumps(ours)}; {remedy}."
    ]


def _decisive(record: dict[str, Any]) -> dict[str, Any]:
    """Of a run's record, what decides its losses but for the data."""
    optimization = _with_peaks_in_schedule({key: record.get("deepspeed", {}).get(key) for key in OPTIMIZATION})
    defaults = {key: field.default for key, field in ModelConfig.model_fields.items() if not field.is_required()}
    model = defaults | record.get("model", {})  # of a version that lacked a field
    if not model["rope_scaling"]:  # then it only limits the lengths of samples, which may change
        model.pop("max_position_embeddings", None)
    decisive = {**record, "model": model, "optimization": optimization}
    return {key: decisive.get(key) for key in SAME_ON_RESUME}


def _with_peaks_in_schedule(optimization: dict[str, Any]) -> dict[str, Any]:
    """The same settings, with the optimizer's learning rates among those of the schedule, which may change."""
    optimizer, scheduler = optimization["optimizer"], optimization["scheduler"]
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    if not isinstance(params, dict) or not isinstance(scheduler, dict):
        return optimization
    peaks = {f"optimizer.params.{key}": params[key] for key in PEAKS if key in params}
    rest = {**optimizer, "params": {key: value for key, value in params.items() if key not in PEAKS}}
    return {**optimization, "optimizer": rest, "scheduler": {**scheduler, **peaks}}


def _remedy(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    if key == "optimization" and _part(now[key], before[key]).keys() == {"scheduler"}:
        return "give --resume to continue with the new schedule"
    return "resume with the same, or choose another --run_dir"


def _part(value: Any, other: Any) -> Any:
    """Of an object, what differs from `other`; of anything else, all."""
    if not isinstance(value, dict) or not isinstance(other, dict):
        return value
    return {key: _part(inner, other.get(key)) for key, inner in value.items() if inner != other.get(key)}
