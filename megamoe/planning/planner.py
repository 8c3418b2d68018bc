"""The plan of a run on any number of GPUs: whether it fits, what it sends, how fast it should be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megamoe.config.model import ModelConfig
from megamoe.config.precision import faster_of
from megamoe.config.recipe import Recipe, parse_recipe
from megamoe.config.run import RunConfig
from megamoe.config.run_checks import run_problems
from megamoe.formats.config_json import find_preset
from megamoe.model.grouped_gemm import choose_kernel
from megamoe.model.placement import placement_problems
from megamoe.planning.footprint import Footprint, footprint
from megamoe.planning.options import PlanOptions
from megamoe.planning.rates import CPU, GPU, Rates
from megamoe.planning.search import Split, best_splits, kept_free, largest_micro_batch
from megamoe.planning.sharding import Setup, parameter_groups, read_setup, setup_problems
from megamoe.planning.step_time import StepTime, step_time
from megamoe.planning.traffic import Collective, collectives
from megamoe.utils.data_sheets import DEVICES, Device
from megamoe.utils.errors import Problems, UserError
from megamoe.utils.hardware import measured_bandwidth, measured_flops
from megamoe.utils.host_memory import memory_limits
from megamoe.utils.json_files import read_json
from megamoe.utils.text import size


@dataclass(frozen=True)
class Plan:
    """A checked plan; what it says of bytes and times is predicted."""

    run: RunConfig
    options: PlanOptions
    recipe: Recipe
    setup: Setup
    device: Device
    gpus_per_node: int  # all of them, where they share this machine
    rates: Rates
    splits: list[Split]  # of a search, best first

    @cached_property
    def footprint(self) -> Footprint:
        return footprint(self.setup)

    @cached_property
    def larger_bucket(self) -> tuple[int, int] | None:
        """(elements of a reduction bucket that holds gradients which are too large for one now, the step's peak in
        bytes with it), where that peak is lower: DeepSpeed may keep such a gradient to the end of backward."""
        sizes = {size for group in parameter_groups(self.setup) for size in group.sizes.values()}
        larger = [size for size in sizes if size > self.setup.bucket]
        peaks = [(footprint(replace(self.setup, bucket=size)).peak.total(), size) for size in larger]
        peak, size = min(peaks, default=(self.footprint.peak.total(), 0))
        return (size, peak) if peak < self.footprint.peak.total() else None

    @cached_property
    def collectives(self) -> list[Collective]:
        return collectives(self.setup)

    @cached_property
    def time(self) -> StepTime:
        return step_time(self.setup, self.device, self.gpus_per_node, self.rates)

    @cached_property
    def largest_micro_batch(self) -> int:
        """As the function of this name says it."""
        return largest_micro_batch(self.setup, self.device)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint, over all ranks."""
        return self.footprint.saved * self.setup.world_size

    @property
    def fits(self) -> bool:
        return self.footprint.peak.total() <= self.device.memory


def make_plan(run: RunConfig, options: PlanOptions) -> Plan:
    """Check everything and plan. Raises one UserError with all problems."""
    problems = Problems()
    ranks, on_cpu = options.gpus, options.device == "cpu"
    device = this_machine(ranks) if on_cpu else DEVICES.get(options.device)
    auto = faster_of(device.half_flops, device.single_flops) if device else "bf16"
    given = {"train_micro_batch_size_per_gpu": options.micro_batch, "gradient_accumulation_steps": options.accumulation}
    sizes: dict[str, Any] = {key: value for key, value in given.items() if value}
    if len(sizes) == 2:
        sizes["train_batch_size"] = None  # it is their product

    def recipe_of(path: str) -> Recipe:
        return parse_recipe({**read_json(Path(path)), **sizes}, path, ranks, on_cpu, auto)

    recipe: Recipe = problems.attempt(recipe_of, run.ds_config)
    if recipe:
        problems += setup_problems(recipe)
    model: ModelConfig = problems.attempt(find_preset, run.preset)
    if model:
        problems += run_problems(run, model, recipe)
        problems += placement_problems(model, run.ep_size, recipe.dtype if recipe else "fp32", ranks, run.preset)
    if options.document_tokens and model and not model.document_attention:
        problems.append(f"--document_tokens needs document_attention, which {run.preset} has not; leave it out.")
    if not device:
        problems.append(f"device is {options.device!r}; use one of {', '.join(DEVICES)}, cpu.")
    if options.best:
        chosen = {
            "ep_size": run.ep_size > 1,
            "recompute_blocks": run.recompute_blocks,
            "recompute": run.recompute != "whole",
            "micro_batch": options.micro_batch,
            "accumulation": options.accumulation,
        }
        problems += [f"--best chooses {name} itself; leave --{name} out." for name, value in chosen.items() if value]
    problems.refuse()
    assert device

    seq_len = run.seq_len or model.max_position_embeddings
    # torch for CUDA comes with Triton.
    kernel = choose_kernel(device.capability, recipe.torch_dtype, has_triton=True)
    setup = read_setup(model, recipe, run.ep_size, seq_len, on_cpu, run.ema_decay is not None)
    setup = replace(setup, recompute_blocks=run.recompute_blocks, recompute=run.recompute, compiled=run.compile)
    setup = replace(setup, kernel=kernel, document_tokens=options.document_tokens, imbalance=options.imbalance)
    per_node, rates = ranks if on_cpu else options.gpus_per_node, rates_of(options)
    splits = _search(setup, device, per_node, rates, recipe) if options.best else []
    if splits:
        setup = splits[0].setup
        recipe = recipe.replaced(split_keys(setup))
    return Plan(run, options, recipe, setup, device, per_node, rates, splits)


def rates_of(options: PlanOptions) -> Rates:
    """What is assumed, with what the options say instead."""
    rates = replace(CPU if options.device == "cpu" else GPU, links=options.link_efficiency)
    if options.efficiency:
        rates = replace(rates, gemms=options.efficiency)
    return replace(rates, operator=options.launch_us / 1e6) if options.launch_us else rates


def split_keys(setup: Setup) -> dict[str, int]:
    """What the DeepSpeed JSON has of a split, by the path of the keys."""
    return {
        "zero_optimization.stage": setup.zero_stage,
        "train_micro_batch_size_per_gpu": setup.micro_batch,
        "gradient_accumulation_steps": setup.accumulation,
    }


def _search(setup: Setup, device: Device, per_node: int, rates: Rates, recipe: Recipe) -> list[Split]:
    samples = recipe.train_batch_size
    splits = best_splits(setup, device, per_node, rates, samples)
    if not splits:
        kept = f" with {samples} samples per step" if samples else ""
        usable = size((1 - kept_free(setup)) * device.memory)
        raise UserError(
            f"nothing{kept} fits in {usable} on {setup.world_size} ranks; use more ranks or a shorter --seq_len."
        )
    return splits


def this_machine(ranks: int) -> Device:
    """One of `ranks` equal shares of this machine, at the rates of a GEMM and of a copy that are measured
    now."""
    cpu = torch.device("cpu")
    rate = measured_bandwidth(cpu) / ranks
    half, single = (measured_flops(cpu, dtype) / ranks for dtype in (torch.bfloat16, torch.float32))
    return Device("CPU", half, single, memory_limits()[0] / ranks, rate, rate / 2, rate / 2, rate / 2, rate)
