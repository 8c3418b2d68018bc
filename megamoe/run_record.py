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
from megamoe.config.recipe import Recipe
from megamoe.config.run import RunConfig
from megamoe.data.batches import TrainData
from megamoe.data.packing import PackedCorpus
from megamoe.data.source import DataSource
from megamoe.formats.config_json import differences, preset_of
from megamoe.model.costs import parameter_count
from megamoe.model.grouped_gemm import DESCRIPTIONS, kernel_for
from megamoe.run_inputs import RunInputs

REPEATS = 4  # of a corpus, which are nearly worth as much new text


def make_record(
    run: RunConfig, model: ModelConfig, recipe: Recipe, data: TrainData, inputs: RunInputs, run_id: str | None
) -> dict[str, Any]:
    """The resolved configuration and the versions."""
    return {
        "run_id": run_id,
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
        "deepspeed": recipe.json,
        "versions": {
            "megamoe": megamoe.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "deepspeed", "tokenizers", "numpy")},
        },
    }


def describe_run(
    run: RunConfig, model: ModelConfig, recipe: Recipe, data: TrainData, inputs: RunInputs, first: int, last: int
) -> str:
    """The run from step `first` to step `last`, in one line."""
    return (
        f"{run.preset}: {parameter_count(model):,} parameters, {recipe.dtype}"
        f"{', compiled' * run.compile}{', deterministic' * run.deterministic}, "
        f"{data.phases.world_size} rank{'s' * (data.phases.world_size > 1)}, ep_size {run.ep_size}; "
        f"{'; then '.join(_describe_phases(data))}; {_describe_held_out(inputs)}; steps {first} to {last}; "
        f"run folder {run.folder}"
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


def describe_repeats(data: TrainData, last: int) -> str | None:
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


def describe_initial(model: ModelConfig, initial_weights: list[Path]) -> str | None:
    """In which fields the model differs from that of the directory whose weights the run starts from."""
    directory = next((path for path in initial_weights if (path / "config.json").is_file()), None)
    changed = differences(model, preset_of(directory)) if directory else []
    return f"the model differs from that of {directory} in {', '.join(changed)}" if changed else None


def describe_experts_gemms(device: torch.device, dtype: torch.dtype) -> str | None:
    """What multiplies rows with their experts' weights on this device, where it is not the fastest way."""
    kernel = kernel_for(device, dtype)
    return None if kernel == "grouped_mm" else f"the experts' GEMMs are {DESCRIPTIONS[kernel]}"
