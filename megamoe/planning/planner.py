"""The plan of a run on any number of GPUs: whether it fits, what it sends, how fast it should be."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field

from megamoe.config import ModelConfig, RunConfig, load_preset
from megamoe.ds_config import DTYPES, deepspeed_problems, dtype_of, run_problems
from megamoe.errors import Problems
from megamoe.hardware import DEVICES, Device, measured_bandwidth, measured_flops
from megamoe.json_files import read_json
from megamoe.model.costs import parameter_count
from megamoe.model.products import DESCRIPTIONS, choose_kernel
from megamoe.planning.footprint import Footprint, footprint
from megamoe.planning.sharding import Setup, parameter_groups, read_setup, setup_problems
from megamoe.planning.simulate import Measured
from megamoe.planning.traffic import LATENCY_BETWEEN, LATENCY_INSIDE, Collective, StepTime, collectives, step_time

GIB = 2**30
MIB = 2**20


RUN_OPTIONS = ("ds_config", "preset", "ep_size", "seq_len", "recompute_blocks")  # of a run that its plan depends on


class PlanOptions(BaseModel):
    """What only a plan has, beyond the run's own configuration. Each field is one option of tools/plan.py; its
    description is the option's help."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpus: int = Field(gt=0, description="ranks, over all nodes")
    device: str = Field(default="h100", description=f"{', '.join(DEVICES)}, or cpu: this machine, all ranks on it")
    micro_batch: int | None = Field(
        default=None, gt=0, description="samples per rank and forward pass; by default the DeepSpeed JSON's"
    )
    gpus_per_node: int = Field(default=8, gt=0, description="ranks whose links are those inside a node")
    efficiency: float = Field(
        default=0.4, gt=0, le=1, description="share of the peak FLOP/s that forward and backward reach (assumed)"
    )
    link_efficiency: float = Field(
        default=0.7, gt=0, le=1, description="share of the links' rates that collectives reach (assumed)"
    )
    simulate: bool = Field(
        default=False, description="also run one rank on this machine's CPU, and compare what it takes"
    )


@dataclass(frozen=True)
class Plan:
    """A checked plan."""

    run: RunConfig
    options: PlanOptions
    ds: dict[str, Any]
    setup: Setup
    device: Device
    gpus_per_node: int  # all of them, where they share this machine
    footprint: Footprint
    collectives: list[Collective]
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.footprint.peak.total() <= self.device.memory


def make_plan(run: RunConfig, options: PlanOptions) -> Plan:
    """Check everything and plan. Raises one UserError with all problems."""
    problems = Problems()
    ranks, on_cpu = options.gpus, options.device == "cpu"
    ds: dict[str, Any] = problems.attempt(read_json, Path(run.ds_config))
    if ds is not None:
        if options.micro_batch:
            ds["train_micro_batch_size_per_gpu"] = options.micro_batch
        problems += deepspeed_problems(ds, run.ds_config, ranks, on_cpu or options.simulate)
        problems += setup_problems(ds, run.ds_config)
    model: ModelConfig = problems.attempt(load_preset, run.preset)
    if model:
        problems += run_problems(run, model, ds or {}, ranks)
    if not on_cpu and options.device not in DEVICES:
        problems.append(f"device is {options.device!r}; use one of {', '.join(DEVICES)}, cpu.")
    problems.refuse()

    seq_len = run.seq_len or model.max_position_embeddings
    device = this_machine(ranks) if on_cpu else DEVICES[options.device]
    # torch for CUDA comes with Triton.
    kernel = choose_kernel(device.capability, DTYPES[dtype_of(ds)], has_triton=True)
    setup = read_setup(model, ds, ranks, run.ep_size, seq_len, on_cpu, run.recompute_blocks, kernel)
    per_node = ranks if on_cpu else options.gpus_per_node
    times = step_time(setup, device, per_node, options.efficiency, options.link_efficiency)
    return Plan(run, options, ds, setup, device, per_node, footprint(setup), collectives(setup), times)


def this_machine(ranks: int) -> Device:
    """One of `ranks` equal shares of this machine, at the rates of a matrix product and of a copy that are measured
    now."""
    cpu = torch.device("cpu")
    rate = measured_bandwidth(cpu) / ranks
    half, single = (measured_flops(cpu, dtype) / ranks for dtype in (torch.bfloat16, torch.float32))
    return Device("CPU", half, single, psutil.virtual_memory().total / ranks, rate, rate / 2, rate / 2, rate / 2, rate)


# --- in sentences and as JSON --------------------------------------------------------------------------------------


def assumptions(plan: Plan) -> list[str]:
    """What the figures rest on, one sentence each."""
    options, device = plan.options, plan.device
    rates = "rates measured now" if options.device == "cpu" else "rates of the data sheet"
    found = [
        f"{device.name}: {rates}, {device.flops(plan.setup.weight_bytes) / 1e12:.4g} TFLOP/s dense, "
        f"{device.memory / GIB:.4g} GiB, links {device.inside / 1e9:.4g} GB/s each way inside a node of "
        f"{plan.gpus_per_node} and {device.between / 1e9:.4g} GB/s per GPU between nodes.",
        f"Forward and backward reach {options.efficiency:.0%} of the peak (--efficiency), collectives "
        f"{options.link_efficiency:.0%} of the links (--link_efficiency) after {LATENCY_INSIDE * 1e6:.0f} us "
        f"({LATENCY_BETWEEN * 1e6:.0f} us between nodes) for each call.",
        f"The experts' products are {DESCRIPTIONS[plan.setup.kernel]}"
        + ("; these waits are not in the predicted time." if plan.setup.kernel == "loop" else "."),
        "Every expert gets equally many rows. Reducing gradients hides behind the backward pass where overlap_comm is "
        "set; everything else waits.",
        "Bytes are those of tensors: the device's context, buffers of the communication library and an allocator's "
        "fragments come on top.",
    ]
    largest = max(size for group in parameter_groups(plan.setup) for size in group.sizes.values())
    if largest > plan.setup.bucket:
        found.append(
            f"zero_optimization.reduce_bucket_size is {plan.setup.bucket:,}, below the {largest:,} numbers of the "
            "largest parameter: a gradient above it is reduced on its own, and may stay to the end of backward."
        )
    if plan.setup.offload:
        found.append(
            f"Offloaded optimizer: {device.host / 1e9:.4g} GB/s each way between device and host, of which "
            f"{options.link_efficiency:.0%} are reached, and {device.host_memory_rate / 1e9:.4g} GB/s of host memory "
            "per rank, which bound its step; transfers hide behind nothing."
        )
    return found


def as_json(plan: Plan, measured: Measured | None) -> dict[str, Any]:
    """The plan as an object for a JSON file; sizes in bytes, times in seconds."""
    setup = {key: value for key, value in asdict(plan.setup).items() if key != "model"}
    peak = plan.footprint.peak
    record: dict[str, Any] = {
        "preset": plan.run.preset,
        "parameters": parameter_count(plan.setup.model),
        "setup": setup,
        "device": asdict(plan.device),
        "assumptions": assumptions(plan),
        "memory": {
            "peak": {kind: size for kind, size in peak.items() if size},
            "totals": totals(plan.footprint),
            "host": dict(plan.footprint.host),
            "fits": plan.fits,
        },
        "communication": [
            {
                **asdict(one),
                **dict(zip(("sent_inside", "sent_between"), one.sent(plan.gpus_per_node), strict=True)),
                "seconds": one.seconds(plan.device, plan.gpus_per_node, plan.options.link_efficiency),
            }
            for one in plan.collectives
        ],
        "time": {
            **asdict(plan.time),
            "step": plan.time.seconds,
            "tokens_per_second": plan.time.tokens_per_second,
            "tokens_per_day": plan.time.tokens_per_second * 86_400,
        },
    }
    if measured:
        record["simulated"] = {"memory": comparison(plan, measured), "payload": payloads(plan, measured)}
    return record


def totals(bytes_held: Footprint) -> dict[str, int]:
    """Bytes of each phase of a step at its peak, and at that of the step."""
    phases = {name: getattr(bytes_held, name).total() for name in ("between", "forward", "backward", "step")}
    return {**phases, "peak": bytes_held.peak.total()}


def comparison(plan: Plan, measured: Measured) -> dict[str, dict[str, int]]:
    """Bytes that the simulated rank took, next to those of the arithmetic for a CPU."""
    setup = replace(plan.setup, on_cpu=True, kernel="grouped_mm")
    return {
        name: {"predicted": size, "measured": getattr(measured, name)}
        for name, size in totals(footprint(setup)).items()
    }


def payloads(plan: Plan, measured: Measured) -> dict[str, dict[str, int]]:
    """Payload by kind of collective and ranks of its group."""
    predicted: Counter[tuple[str, int]] = Counter()
    for one in plan.collectives:
        predicted[one.kind, one.ranks] += one.payload
    return {
        f"{kind} over {ranks}": {"predicted": predicted[kind, ranks], "measured": measured.payload[kind, ranks]}
        for kind, ranks in sorted(predicted.keys() | measured.payload.keys())
    }
