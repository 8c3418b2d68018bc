"""What a rank has sent in the steps of a run, next to what the planner predicts."""

from __future__ import annotations

from dataclasses import replace

from megamoe.config.model import ModelConfig
from megamoe.config.recipe import Recipe
from megamoe.config.run import RunConfig
from megamoe.data.batches import TrainData
from megamoe.planning.sharding import Setup, read_setup, setup_problems
from megamoe.planning.traffic import payload_of
from megamoe.training.collectives import Collectives


def setup_of(run: RunConfig, model: ModelConfig, recipe: Recipe, data: TrainData) -> Setup | None:
    """What the traffic of a run's steps follows from; None where they differ, or are not modelled."""
    phase, *others = data.phases.all
    if others or setup_problems(recipe):
        return None
    setup = read_setup(model, recipe, run.ep_size, phase.seq_len, recipe.on_cpu)
    setup = replace(setup, recompute_blocks=run.recompute_blocks, recompute=run.recompute)
    sources = len(data.source_names)
    return replace(setup, micro_batch=phase.micro_batch, accumulation=phase.accumulation, num_sources=sources)


def describe_traffic(found: Collectives, setup: Setup | None) -> str:
    """A table of the collectives of a step, by kind and ranks of the group.

    Args:
        found: the collectives of this rank, entered for each step.
        setup: to predict by; None predicts nothing.
    """
    lines = [f"collectives of a step on rank 0, means of {found.entered} steps; none is waited for, so without times"]
    lines.append(f"{'collective':16}{'ranks':>6}{'calls':>10}{'bytes':>20}{'predicted bytes':>20}")
    predicted = payload_of(setup) if setup else {}
    for key in sorted(found.calls.keys() | predicted.keys()):
        calls, size = found.calls[key] / found.entered, found.payload[key] / found.entered
        expected = f"{predicted.get(key, 0):,}" if setup else "-"
        lines.append(f"{key[0]:16}{key[1]:6}{calls:10,.1f}{size:20,.0f}{expected:>20}")
    return "\n".join(lines)
