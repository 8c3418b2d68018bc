"""One step under torch's profiler, reduced to numbers: how busy the device is, and what the host waits for.

The profiler's own work is part of the host's times: without it they are shorter.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

STEP = "megamoe step"
# Kineto's categories: of what runs on the device, and of the host's calls to its driver.
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
# Of these, what allocates or frees memory may wait for the device, as `...Synchronize` does. Calls for copies are left
# out: most return at once, and torch waits for the others by a call of its own.
ALLOCATIONS = ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaHostRegister", "cudaFreeHost")


@dataclass(frozen=True)
class Total:
    """How often, and for how long together."""

    count: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class StepProfile:
    """What one step did, on the host's clock."""

    seconds: float  # from the step's begin to the end of its last event
    operators: int  # innermost ones of torch, views among them
    kernels: int
    busy: float  # seconds in which anything runs on the device
    gaps: Total  # between what runs on the device
    largest_gap: float  # seconds
    after_largest_gap: str  # the kernel that it ends with
    launches: Total  # the host's calls that launch kernels
    waits: dict[str, Total]  # the host's calls that wait for the device
    copies_to_host: Total  # on the device
    host: float  # seconds of the host in the step, without its waits

    @property
    def all_waits(self) -> Total:
        totals = self.waits.values()
        return Total(sum(total.count for total in totals), sum(total.seconds for total in totals))

    @property
    def host_per_kernel(self) -> float:
        """Seconds of the host for each kernel that it launches; 0 without a device."""
        return self.host / self.launches.count if self.launches.count else 0.0


def profile_step(step: Callable[[], Any], device: torch.device) -> StepProfile:
    """Call `step` twice, and profile the second call."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule) as profiler:
        for _ in range(2):
            with torch.profiler.record_function(STEP):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            profiler.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text())["traceEvents"])


def read_trace(events: Iterable[dict[str, Any]]) -> StepProfile:
    """Reduce the events of a trace of one step.

    Args:
        events: of torch's `export_chrome_trace`; those with a duration count. Times are in microseconds.
    """
    lasting = [event for event in events if event.get("ph") == "X"]
    lasting.sort(key=lambda event: (event["ts"], -event["dur"]))  # what is inside another comes after it
    (step,) = (event for event in lasting if event["name"] == STEP and event["cat"] == "user_annotation")
    on_device = [event for event in lasting if event["cat"] in ON_DEVICE]
    calls = [event for event in lasting if event["cat"] in CALLS and _begins_within(event, step)]
    waiting = [event for event in calls if event["name"].endswith("Synchronize") or event["name"] in ALLOCATIONS]
    waits = {name: _total(event for event in waiting if event["name"] == name) for name in _names(waiting)}
    gaps = _gaps(on_device)
    largest = max(gaps, default=(0.0, ""))
    end = max(_end(event) for event in (step, *on_device))
    return StepProfile(
        seconds=(end - step["ts"]) / 1e6,
        operators=_innermost([event for event in lasting if event["cat"] == "cpu_op" and _begins_within(event, step)]),
        kernels=sum(event["cat"] == "kernel" for event in on_device),
        busy=_covered(on_device) / 1e6,
        gaps=Total(len(gaps), sum(length for length, _ in gaps) / 1e6),
        largest_gap=largest[0] / 1e6,
        after_largest_gap=largest[1],
        launches=_total(event for event in calls if "Launch" in event["name"]),
        waits=waits,
        copies_to_host=_total(event for event in on_device if "DtoH" in event["name"]),
        host=(_end(step) - step["ts"]) / 1e6 - sum(total.seconds for total in waits.values()),
    )


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def _begins_within(event: dict[str, Any], step: dict[str, Any]) -> bool:
    return step["ts"] <= event["ts"] < _end(step)


def _names(events: list[dict[str, Any]]) -> list[str]:
    return sorted({event["name"] for event in events})


def _total(events: Iterable[dict[str, Any]]) -> Total:
    durations = [event["dur"] for event in events]
    return Total(len(durations), sum(durations) / 1e6)


def _gaps(events: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """(microseconds, name of the event that follows) of each time in which nothing runs; `events` by their begin."""
    gaps = []
    covered_to = events[0]["ts"] if events else 0.0
    for event in events:
        if event["ts"] > covered_to:
            gaps.append((event["ts"] - covered_to, event["name"]))
        covered_to = max(covered_to, _end(event))
    return gaps


def _covered(events: list[dict[str, Any]]) -> float:
    """Microseconds in which at least one of the events runs."""
    if not events:
        return 0.0
    return max(map(_end, events)) - events[0]["ts"] - sum(length for length, _ in _gaps(events))


def _innermost(events: list[dict[str, Any]]) -> int:
    """How many of the events have no other one inside them, on the same thread; `events` by their begin."""
    threads: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        threads.setdefault(event["tid"], []).append(event)
    return sum(
        number + 1 == len(own) or own[number + 1]["ts"] >= _end(event)
        for own in threads.values()
        for number, event in enumerate(own)
    )
