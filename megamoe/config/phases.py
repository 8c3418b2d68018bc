"""The phases of a run: the mix that its steps read, the length of its samples and how many a step takes.

`--data_schedule FILE` gives them in order, each for so many tokens:

    {"phases": [{"tokens": 1e9, "samples_per_step": 64}, {"tokens": 9e9}, {"data": ["data/best"], "seq_len": 8192}]}

What a phase leaves out is the run's own; the last one may leave out its tokens, and lasts to the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from megamoe.config.model import JsonModel, ModelConfig, validate
from megamoe.config.recipe import Recipe
from megamoe.config.run import Corpus, CorpusOption, RunConfig
from megamoe.utils.errors import Problems, UserError
from megamoe.utils.json_files import read_json


class PhaseSettings(JsonModel):
    """A phase as the file has it."""

    tokens: int | None = Field(default=None, gt=0)
    """Length, rounded up to a whole step."""
    data: list[CorpusOption] | None = Field(default=None, min_length=1)
    """Its mix, as --data has it."""
    seq_len: int | None = Field(default=None, gt=1)
    """Tokens per sample."""
    samples_per_step: int | None = Field(default=None, gt=0)
    """Over all ranks."""
    micro_batch: int | None = Field(default=None, gt=0)
    """Samples per rank and forward pass."""


class PhaseList(JsonModel):
    """The file."""

    phases: list[Any] = Field(min_length=1)  # PhaseSettings; each is checked by its number


@dataclass(frozen=True)
class Phase:
    """Steps that read the same mix in the same form; they count from 1."""

    first_step: int  # it lasts until the next phase begins
    seq_len: int
    micro_batch: int  # samples per rank and forward pass
    accumulation: int  # forward passes per step and rank
    samples: int  # per step, over all ranks
    data: tuple[Corpus, ...]


@dataclass(frozen=True)
class Phases:
    """All of a run, in order; a pure function of the step."""

    all: tuple[Phase, ...]
    world_size: int

    def at(self, step: int) -> Phase:
        """That of a step."""
        return next(one for one in reversed(self.all) if one.first_step <= step)

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before `step`."""
        return sum(self.tokens_by_phase(step))

    def tokens_by_phase(self, step: int) -> list[int]:
        """Tokens of the steps of each phase before `step`."""
        ends = [*(one.first_step for one in self.all[1:]), step]
        pairs = zip(self.all, ends, strict=True)
        return [max(min(end, step) - one.first_step, 0) * one.samples * one.seq_len for one, end in pairs]

    def step_after(self, tokens: int) -> int:
        """The step with which so many tokens are reached."""
        for one, following in zip(self.all, [*self.all[1:], None], strict=True):
            left = tokens - self.tokens_before(one.first_step)
            step = one.first_step - 1 - (-left // (one.samples * one.seq_len))
            if following is None or step < following.first_step:
                return step
        raise AssertionError("the last phase has no end")


def read_phases(file: str) -> list[PhaseSettings]:
    """Those of `--data_schedule`. Raises UserError."""
    problems = Problems()
    given = enumerate(validate(PhaseList, read_json(Path(file)), file).phases, start=1)
    phases = [problems.attempt(validate, PhaseSettings, one, f"{file}: phase {number}") for number, one in given]
    problems.refuse()
    endless = [number for number, phase in enumerate(phases[:-1], start=1) if phase.tokens is None]
    if endless:
        raise UserError(f"{file}: phase {endless[0]} has no tokens, which only the last may leave out; add them.")
    return phases


def phases_of(run: RunConfig, recipe: Recipe, model: ModelConfig) -> Phases:
    """The phases of a run. Raises UserError."""
    return make_phases(
        read_phases(run.data_schedule) if run.data_schedule else [PhaseSettings()],
        data=run.data,
        seq_len=run.seq_len or model.max_position_embeddings,
        micro_batch=recipe.micro_batch,
        samples=recipe.micro_batch * recipe.accumulation * recipe.world_size,
        world_size=recipe.world_size,
        last_step=run.steps or (None if recipe.tokens else recipe.schedule.total_steps),
        longest=model.max_position_embeddings if model.rope_scaling is None else None,
    )


def make_phases(
    given: list[PhaseSettings],
    *,
    data: list[Corpus],
    seq_len: int,
    micro_batch: int,
    samples: int,
    world_size: int,
    last_step: int | None = None,
    longest: int | None = None,
) -> Phases:
    """The phases of a run on so many ranks. Raises UserError.

    Args:
        data, seq_len, micro_batch, samples: what a phase leaves out; samples are per step, over all ranks.
        last_step: of the run, if it is known.
        longest: sequence that the model takes; None for any.
    """
    problems, phases, step = Problems(), list[Phase](), 0
    for number, one in enumerate(given, start=1):
        micro = one.micro_batch or micro_batch
        taken, length = one.samples_per_step or samples, one.seq_len or seq_len
        unit = micro * world_size
        if taken % unit:
            problems.append(
                f"data_schedule: phase {number} has {taken} samples per step, but {micro} per rank x {world_size} "
                f"ranks is {unit}; give a multiple of {unit}, or another micro_batch."
            )
        if one.seq_len and longest and length > longest:
            problems.append(
                f"data_schedule: phase {number} has seq_len {length}, above max_position_embeddings {longest}; lower "
                "it, or raise that or set rope_scaling in the preset."
            )
        mix = tuple(data if one.data is None else one.data)
        paths = [corpus.path for corpus in mix]
        for path in {path for path in paths if paths.count(path) > 1}:
            problems.append(f"data: phase {number} names {path} twice; give it once, with the sum of both weights.")
        phases.append(Phase(step + 1, length, micro, taken // unit, taken, mix))
        step += 0 if one.tokens is None else math.ceil(one.tokens / (taken * length))
    if given[-1].tokens and last_step and step < last_step:
        problems.append(
            f"data_schedule: the phases end at step {step}, but the run at {last_step}; leave the last one's tokens "
            "out, or lower --steps."
        )
    problems.refuse()
    return Phases(tuple(phases), world_size)
