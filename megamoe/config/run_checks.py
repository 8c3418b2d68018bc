"""What does not fit between the owners of settings: preset, DeepSpeed JSON and command line."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from megamoe.config.model import ModelConfig
from megamoe.config.recipe import Recipe
from megamoe.config.run import MOST_PROMPTS, PROMPT, RunConfig
from megamoe.config.schedule import Schedule
from megamoe.utils.errors import SoundFields, broken_rules


def run_problems(run: RunConfig, model: ModelConfig | None, recipe: Recipe | SoundFields | None) -> list[str]:
    """What does not fit between the three owners, one sentence each.

    Args:
        model: None where the preset has problems itself, which leave out what needs it.
        recipe: of one with problems, the fields that have none.
    """
    owners = SoundFields(run=run, recipe=recipe or SoundFields(), **({"model": model} if model else {}))
    return broken_rules((_seq_len, _recomputed_blocks, _guard, _samples, _trackers), owners)


def _seq_len(m: Any) -> Iterator[str]:
    limit = m.model.max_position_embeddings
    if m.run.seq_len and m.run.seq_len > limit and m.model.rope_scaling is None:
        yield (
            f"seq_len is {m.run.seq_len}, above max_position_embeddings {limit} of {m.run.preset}; lower it, or raise "
            "that or set rope_scaling in the preset."
        )


def _recomputed_blocks(m: Any) -> Iterator[str]:
    if m.run.recompute_blocks > m.model.num_hidden_layers:
        yield (
            f"recompute_blocks is {m.run.recompute_blocks}, but {m.run.preset} has {m.model.num_hidden_layers} blocks; "
            "give at most that many."
        )
    if m.run.recompute == "selective" and not m.run.recompute_blocks:
        yield "recompute is 'selective', but recompute_blocks is 0; give the number of blocks, or leave it out."


def _guard(m: Any) -> Iterator[str]:
    if m.run.guard == "act" and not m.recipe.bf16.check_grad_overflow:
        yield (
            f'guard is "act", but "check_grad_overflow" in the "bf16" section of {m.run.ds_config} is false, with '
            "which DeepSpeed skips no step; set it to true."
        )


def _samples(m: Any) -> Iterator[str]:
    if m.run.sample_prompts != [PROMPT] and not m.run.sample_interval:
        yield "sample_prompts are given, but sample_interval is 0, so none is continued; raise it."
    if len(m.run.sample_prompts) > MOST_PROMPTS:  # such as the lines of a corpus
        yield f"sample_prompts has {len(m.run.sample_prompts):,} texts, more than {MOST_PROMPTS}; give fewer."


def chosen_trackers(run: RunConfig, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The trackers of a run by their names in `monitoring/sinks.py`, each with its settings."""
    sections: dict[str, Any] = {"tensorboard": recipe.tensorboard, "csv": recipe.csv_monitor, "wandb": recipe.wandb}
    names = {*run.trackers, *(name for name, section in sections.items() if section.enabled)}
    return {name: sections[name].settings(run.folder / name) if name in sections else {} for name in sorted(names)}


def _trackers(m: Any) -> Iterator[str]:
    for name, key in (("wandb", "wandb"), ("csv", "csv_monitor")):
        section = getattr(m.recipe, key)
        if name in m.run.trackers and "enabled" in section.model_fields_set and not section.enabled:
            yield f'trackers names {name}, but "{key}" in {m.run.ds_config} has "enabled": false; keep one of both.'
    for name in sorted({"wandb", "trackio"} & chosen_trackers(m.run, m.recipe).keys()):
        package = find_spec(name)
        if not package or not package.origin:  # a folder of that name is none
            yield f"the tracker {name} needs its package, which is not installed; pip install 'megamoe[{name}]'."


def length_problems(run: RunConfig, schedule: Schedule) -> list[str]:
    """What keeps the run from an end, one sentence: it has that of its schedule, or one before it."""
    if schedule.total_steps is None:
        if run.schedule_steps:
            return [f"schedule_steps is {run.schedule_steps}, but {run.ds_config} has no end; give --steps instead."]
        if run.steps is None:
            return [f"the schedule in {run.ds_config} has no end, and --steps is missing; give the last step."]
        return []
    total = run.schedule_steps or schedule.total_steps
    if run.steps and run.steps > total:
        where = "by --schedule_steps" if run.schedule_steps else f"in {run.ds_config}"
        longer = "--schedule_steps" if run.schedule_steps else "total_num_steps"
        return [
            f"steps is {run.steps}, but the schedule {where} ends at step {total}; lower --steps or raise {longer}."
        ]
    return []
