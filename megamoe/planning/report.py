"""What a plan says, in sentences and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from megamoe.model.costs import active_parameter_count, parameter_count, parameter_shapes
from megamoe.model.grouped_gemm import DESCRIPTIONS
from megamoe.model.names import MTP
from megamoe.planning.footprint import Footprint
from megamoe.planning.planner import Plan, split_keys
from megamoe.planning.search import Split
from megamoe.planning.step_time import Part, StepTime
from megamoe.planning.traffic import LATENCY_BETWEEN, LATENCY_INSIDE
from megamoe.utils.text import size

# What limits a step, and what to change.
LIMITS: dict[Part, str] = {
    "launches": "the host, which launches operators",
    "waits": "waits of the host for the device",
    "gemms": "GEMMs",
    "attention": "attention",
    "memory": "memory traffic of operators other than GEMMs",
    "copies": "DeepSpeed's copies of gradients",
    "exchange": "the all-to-all of rows between ranks",
    "gradients": "the reduction of gradients",
    "optimizer": "memory traffic of the optimizer",
    "weights": "gathering the updated weights",
    "transfers": "transfers to and from the host's memory",
}
ADVICE: dict[Part, str] = {
    "launches": "give a forward pass more tokens (micro-batch)",
    "waits": "give a forward pass more tokens (micro-batch), or train in bf16 on a GPU with one kernel for all experts",
    "gemms": "little is left to gain but wider experts or more tokens per expert (a smaller ep_size or more tokens)",
    "attention": "shorten the sequences, or widen the heads",
    "memory": "a wider model moves fewer bytes for each of its operations",
    "copies": "give a forward pass more tokens (micro-batch), or raise ep_size; with accumulation use ZeRO-1",
    "exchange": "lower ep_size, and keep it within a node",
    "gradients": "raise the micro-batch; with accumulation use ZeRO-1, which reduces once per step",
    "optimizer": "accumulate over more micro-batches, or use more ranks",
    "weights": "accumulate over more micro-batches, or raise ep_size",
    "transfers": "keep the optimizer on the device, or accumulate over more micro-batches",
}


@dataclass(frozen=True)
class RunTotals:
    """Of a whole run."""

    steps: int
    tokens: int
    seconds: float
    gpu_hours: float
    cost: float | None  # in the currency of the price
    epochs: dict[str, float]  # of each corpus, by its path


def export_bytes(plan: Plan) -> dict[str, int]:
    """Of the exported weights, by precision."""
    shapes = parameter_shapes(plan.setup.model).items()
    weights = sum(math.prod(shape) for name, shape in shapes if not name.startswith(MTP))
    return {"fp32": 4 * weights, "bf16": 2 * weights}


def advice(plan: Plan) -> str:
    """What to change against what limits the step."""
    if not plan.fits:
        return "it does not fit: lower the micro-batch, raise --recompute_blocks or ep_size, or search with --best"
    limit = plan.time.limit
    helps = limit in ("launches", "memory") and not plan.setup.compiled
    return ("compile (--compile); " if helps else "") + ADVICE[limit]


def assumptions(plan: Plan) -> list[str]:
    """What the figures rest on, one sentence each."""
    options, device, rates = plan.options, plan.device, plan.rates
    sheet = "rates measured now" if options.device == "cpu" else "rates of the data sheet"
    found = [
        f"{device.name}: {sheet}, {device.flops(plan.setup.weight_bytes) / 1e12:.4g} TFLOP/s dense, "
        f"{size(device.memory)}, links {device.inside / 1e9:.4g} GB/s each way inside a node of "
        f"{plan.gpus_per_node} and {device.between / 1e9:.4g} GB/s per GPU between nodes.",
        f"The largest GEMMs reach {rates.gemms:.0%} of the peak (--efficiency), smaller ones what their tiles "
        f"and bytes allow, other operators {rates.memory:.0%} of the memory's {device.memory_rate / 1e12:.3g} TB/s, "
        f"collectives {rates.links:.0%} of the links (--link_efficiency) after {LATENCY_INSIDE * 1e6:.0f} us "
        f"({LATENCY_BETWEEN * 1e6:.0f} us between nodes) for each call.",
        f"The host needs {1e6 * rates.operator:g} us for an operator (--launch_us), {1e6 * rates.parameter:g} us more "
        f"for each gradient that DeepSpeed takes, and {1e6 * rates.wait:g} us after the device for what it waits for.",
        f"The experts' GEMMs are {DESCRIPTIONS[plan.setup.kernel]}.",
        "Every expert gets equally many rows; but memory is that of a rank whose experts, where ranks share them, get "
        f"{plan.setup.imbalance:g} times the mean (--imbalance), or all that there are, if these are fewer.",
        "Under overlap_comm the reduction of a bucket hides behind the gradients that fill the next, under ZeRO-1 that "
        "of a group behind the rest of the last pass; on a GPU rows hide behind shared experts; all else waits.",
        "Bytes are those of tensors: the device's context, buffers of the communication library and an allocator's "
        "fragments come on top.",
    ]
    if plan.setup.offload:
        found.append(
            f"Offloaded optimizer: {device.host / 1e9:.4g} GB/s each way between device and host, of which "
            f"{options.link_efficiency:.0%} are reached, and {device.host_memory_rate / 1e9:.4g} GB/s of host memory "
            "per rank, which bound its step; transfers hide behind nothing."
        )
    return found


def as_json(plan: Plan, run: RunTotals | None) -> dict[str, Any]:
    """The plan as an object for a JSON file; sizes in bytes, times in seconds."""
    setup = {key: value for key, value in asdict(plan.setup).items() if key != "model"}
    peak = plan.footprint.peak
    record: dict[str, Any] = {
        "preset": plan.run.preset,
        "parameters": parameter_count(plan.setup.model),
        "active_parameters": active_parameter_count(plan.setup.model),
        "setup": setup,
        "device": asdict(plan.device),
        "rates": asdict(plan.rates),
        "assumptions": assumptions(plan),
        "predicted": {
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
                    "seconds": one.seconds(plan.device, plan.gpus_per_node, plan.rates.links),
                }
                for one in plan.collectives
            ],
            "run": asdict(run) if run else None,
            "largest_micro_batch": plan.largest_micro_batch,
            "checkpoint_bytes": plan.checkpoint_bytes,
            "export_bytes": export_bytes(plan),
            "time": {**time_as_json(plan.time), "advice": advice(plan)},
        },
    }
    if plan.splits:
        record["best"] = [split_as_json(split) for split in plan.splits]
    return record


def time_as_json(time: StepTime) -> dict[str, Any]:
    return {
        "phases": [{**asdict(phase), "seconds": phase.seconds, "limit": phase.limit} for phase in time.phases],
        "parts": time.parts,
        "limit": time.limit,
        "step": time.seconds,
        "tokens": time.tokens,
        "tokens_per_second": time.tokens_per_second,
        "mfu": time.mfu,
    }


def split_as_json(split: Split) -> dict[str, Any]:
    """A split as options and keys of the DeepSpeed JSON, with what is predicted of it."""
    return {
        "options": {name: getattr(split.setup, name) for name in ("ep_size", "recompute_blocks", "recompute")},
        "ds_config": split_keys(split.setup),
        "predicted": {
            "memory": split.memory,
            "tokens_per_second": split.time.tokens_per_second,
            "mfu": split.time.mfu,
            "limit": split.time.limit,
        },
    }


def totals(bytes_held: Footprint) -> dict[str, int]:
    """Bytes of each phase of a step at its peak, and at that of the step."""
    phases = {name: getattr(bytes_held, name).total() for name in ("between", "forward", "backward", "step")}
    return {**phases, "peak": bytes_held.peak.total()}
