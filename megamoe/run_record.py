"""What a run says of itself: its record, which is enough to repeat it, and the first lines of its log."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import megamoe
from megamoe.config.alert_targets import without_secrets
from megamoe.config.model import ModelConfig
from megamoe.config.phases import Phases
from megamoe.data.batches import TrainData
from megamoe.data.packing import PackedCorpus
from megamoe.data.source import DataSource
from megamoe.formats.config_json import differences, preset_of
from megamoe.model.attention_kernels import describe_attention
from megamoe.model.costs import parameter_count
from megamoe.model.grouped_gemm import DESCRIPTIONS, kernel_for
from megamoe.run_inputs import Checked, RunInputs
from megamoe.training.weight_average import WeightAverage

REPEATS = 4  # of a corpus, which are nearly worth as much new text


def make_record(checked: Checked) -> dict[str, Any]:
    """The resolved configuration and the versions."""
    run, model, data, inputs, folder = checked.run, checked.model, checked.data, checked.inputs, checked.start.folder
    return {
        "run_id": folder.run_id() if folder else None,
        "command": [without_secrets(word) for word in sys.argv],
        "preset": run.preset,
        "parameters": parameter_count(model),
        "model": model.model_dump(),
        "run": run.model_dump(),
        "seed": run.seed,
        "world_size": data.phases.world_size,
        "ep_size": run.ep_size,
        "phases": data.record(),
        "tokenizer_sha256": inputs.tokenizer and hashlib.sha256(inputs.tokenizer.read_bytes()).hexdigest(),
        "end_of_text": inputs.end_of_text,
        "deepspeed": checked.recipe.json,
        "versions": {
            "megamoe": megamoe.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "deepspeed", "tokenizers", "numpy")},
        },
        "last_step": checked.last_step,
    }


def first_lines(checked: Checked, first: int, checkpoint: Path | None, average: WeightAverage | None) -> list[str]:
    """What the log says of the run before step `first` + 1.

    Args:
        checkpoint: that it resumes from.
        average: of the weights, if the run keeps one; it has begun where the checkpoint holds it.
    """
    run, model, start, changes, device = checked.run, checked.model, checked.start, checked.changes, checked.device
    dtype, longest = checked.recipe.torch_dtype, max(phase.seq_len for phase in checked.data.phases.all)
    lines: list[str | None] = [
        _describe_run(checked, first),
        _describe_repeats(checked.data, checked.last_step),
        f"resumed from {checkpoint}" if checkpoint else None,
        checked.precision.describe(checked.recipe),
        _describe_initial(model, start.initial_weights),
        describe_experts_gemms(device, dtype),
        describe_attention(model, device, dtype, longest),
    ]
    if start.is_resuming and not checkpoint:
        lines.append(f"{run.folder} holds no complete checkpoint, so the run begins again at step 0")
    if changes.schedule:
        lines.append(f"the schedule changes after step {first} {changes.schedule}")
    if changes.phases:
        lines.append(f"the data that the run reads after step {first} changes")
    if checkpoint:
        lines.append(_describe_average(checked, first, average))
    return [line for line in lines if line]


def _describe_average(checked: Checked, first: int, average: WeightAverage | None) -> str | None:
    """What becomes of the averaged weights in a run that resumes, where anything does."""
    before, decay = checked.changes.ema_decay_before, checked.run.ema_decay
    if not average:
        return None if before is None else f"the average of the weights ends after step {first} (--ema_decay {before})"
    if not average.has_begun:
        return (
            f"the checkpoint of step {first} holds no averaged weights; the average begins with the weights after the "
            "next step"
        )
    if before not in (None, decay):
        return f"the decay of the averaged weights changes after step {first}: {before} -> {decay}"
    return None


def _describe_run(checked: Checked, first: int) -> str:
    run, data = checked.run, checked.data
    return (
        f"{run.preset}: {parameter_count(checked.model):,} parameters, {checked.recipe.dtype}"
        f"{', compiled' * run.compile}{', deterministic' * run.deterministic}, "
        f"{data.phases.world_size} rank{'s' * (data.phases.world_size > 1)}, ep_size {run.ep_size}; "
        f"{'; then '.join(_describe_phases(data))}; {_describe_held_out(checked.inputs)}; "
        f"steps {first} to {checked.last_step}; run folder {run.folder}"
    )


def _describe_phases(data: TrainData) -> Iterator[str]:
    """Of each phase, the tokens of a step and the corpora that differ from those of the phase before."""
    mix: Any = None
    for phase in data.phases.all:
        begins = f"from step {phase.first_step} on " if phase.first_step > 1 else ""
        corpora = [
            f"{data.sources[one.path, phase.seq_len].num_samples * phase.seq_len:,} tokens in {one.path}"
            + (f" at weight {one.weight:g}" if len(phase.data) > 1 else "")
            + _describe_packing(data.sources[one.path, phase.seq_len])
            for one in phase.data
        ]
        of_what = f"; {', '.join(corpora)}" if phase.data != mix else ""
        yield f"{begins}{phase.samples} x {phase.seq_len} tokens per step{of_what}"
        mix = phase.data


def _describe_packing(source: Any) -> str:
    if not isinstance(source, PackedCorpus):
        return ""
    return f" (best-fit packing: {source.num_samples:,} samples, {source.unused:.1%} of positions unused)"


def times_read(of_run: Phases, sources: Mapping[tuple[str, int], DataSource], last: int) -> dict[str, float]:
    """How often each corpus is read by step `last`.

    Args:
        sources: by path and seq_len.
    """
    read, phases = defaultdict[str, float](float), of_run.all
    for phase, end in zip(phases, [*(one.first_step for one in phases[1:]), last + 1], strict=True):
        samples = max(min(end, last + 1) - phase.first_step, 0) * phase.samples
        weights = sum(one.weight for one in phase.data)
        for one in phase.data:
            read[one.path] += samples * one.weight / weights / sources[one.path, phase.seq_len].num_samples
    return dict(read)


def _describe_repeats(data: TrainData, last: int) -> str | None:
    """Which corpora are read so often by step `last` that they teach little new (Muennighoff et al., 2023)."""
    read = times_read(data.phases, data.sources, last)
    often = [f"{path} {times:.0f} times" for path, times in read.items() if times > REPEATS]
    advice = f"from about {REPEATS} times on, more text serves a model better, or fewer steps (--schedule_steps)"
    return f"reads {', '.join(often)}: {advice}" if often else None


def _describe_held_out(inputs: RunInputs) -> str:
    if not inputs.held_out:
        return "no held-out tokens, so nothing is evaluated (--valid_data gives some)"
    several = len(inputs.held_out) > 1
    return ", ".join(
        f"{one.corpus.num_tokens:,} held-out tokens in {one.corpus.prefix}" + (f" ({one.name})" if several else "")
        for one in inputs.held_out
    )


def _describe_initial(model: ModelConfig, initial_weights: list[Path]) -> str | None:
    """In which fields the model differs from that of the directory whose weights the run starts from."""
    directory = next((path for path in initial_weights if (path / "config.json").is_file()), None)
    changed = differences(model, preset_of(directory)) if directory else []
    return f"the model differs from that of {directory} in {', '.join(changed)}" if changed else None


def describe_experts_gemms(device: torch.device, dtype: torch.dtype) -> str | None:
    """What multiplies rows with their experts' weights on this device, where it is not the fastest way."""
    kernel = kernel_for(device, dtype)
    return None if kernel == "grouped_mm" else f"the experts' GEMMs are {DESCRIPTIONS[kernel]}"
