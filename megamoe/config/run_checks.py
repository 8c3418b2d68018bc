"""What does not fit between the owners of settings: preset, DeepSpeed JSON and command line."""

from __future__ import annotations

from itertools import pairwise

from megamoe.config.model import ModelConfig
from megamoe.config.recipe import Recipe
from megamoe.config.run import RunConfig


def run_problems(run: RunConfig, model: ModelConfig, recipe: Recipe | None) -> list[str]:
    """What does not fit between the three owners, one sentence each; no recipe where it has problems itself."""
    problems = ramp_problems(run, recipe) if recipe else []
    if run.seq_len and run.seq_len > model.max_position_embeddings and model.rope_scaling is None:
        problems.append(
            f"seq_len is {run.seq_len}, above max_position_embeddings {model.max_position_embeddings} of {run.preset}; "
            "lower it, or raise that or set rope_scaling in the preset."
        )
    if run.guard == "act" and recipe and not recipe.bf16.check_grad_overflow:
        problems.append(
            f'guard is "act", but "check_grad_overflow" in the "bf16" section of {run.ds_config} is false, with which '
            "DeepSpeed skips no step; set it to true."
        )
    if run.recompute_blocks > model.num_hidden_layers:
        problems.append(
            f"recompute_blocks is {run.recompute_blocks}, but {run.preset} has {model.num_hidden_layers} blocks; "
            "give at most that many."
        )
    return problems


def task_problems(run: RunConfig) -> list[str]:
    """What does not fit between the options of tasks and held-out sets, one sentence each."""
    both = {source.name for source in run.valid_data} & set(run.lm_eval_tasks)
    problems = [f"a held-out set and a task have the name {name}; write NAME=PATH with another." for name in both]
    if (run.lm_eval_interval or run.lm_eval_folder) and not run.lm_eval_tasks:
        problems.append("lm_eval_interval and lm_eval_folder are of tasks, and none is given; add --lm_eval_tasks.")
    return problems


def ramp_problems(run: RunConfig, recipe: Recipe) -> list[str]:
    """What keeps --batch_ramp from leading up to the batch of the DeepSpeed JSON on these ranks, one sentence each."""
    micro, world_size, full = recipe.micro_batch, recipe.world_size, recipe.samples
    unit = micro * world_size
    stages = run.stages
    problems = [
        f"batch_ramp has {samples} samples per step, but {micro} per rank x {world_size} ranks is {unit}; give a "
        f'multiple of {unit}, or another "train_micro_batch_size_per_gpu".'
        for samples, _ in stages
        if samples % unit
    ]
    problems += [
        f"batch_ramp has {samples} samples up to step {last}, then {more} up to step {later}; let both rise."
        for (samples, last), (more, later) in pairwise(stages)
        if more <= samples or later <= last
    ]
    if stages and stages[-1][0] >= full:
        problems.append(
            f"batch_ramp ends with {stages[-1][0]} samples per step, but the full batch of {run.ds_config} is {full}; "
            "give fewer, and leave the full batch out."
        )
    return problems


def length_problems(run: RunConfig, recipe: Recipe) -> list[str]:
    """What keeps the run from an end, one sentence: it has that of its schedule, or one before it."""
    total = recipe.schedule.total_steps
    if total is None and run.steps is None:
        return [f"the schedule in {run.ds_config} has no end, and --steps is missing; give the last step of the run."]
    if total is not None and run.steps and run.steps > total:
        where = "by --schedule_steps" if run.schedule_steps else f"in {run.ds_config}"
        longer = "--schedule_steps" if run.schedule_steps else "total_num_steps"
        return [
            f"steps is {run.steps}, but the schedule {where} ends at step {total}; lower --steps or raise {longer}."
        ]
    return []
