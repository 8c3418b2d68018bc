"""The faster precision of a device: what `"bf16": {"enabled": "auto"}` in a DeepSpeed JSON stands for.

bf16 takes half the memory of fp32 and is the faster one on GPUs and recent server processors. A processor without bf16
instructions, as in most laptops, multiplies bf16 matrices up to a hundred times slower than fp32 ones.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megamoe.config.recipe import Choice, Recipe, dtype_of
from megamoe.utils.errors import UserError
from megamoe.utils.hardware import Peak, describe_flops, measured_flops, peak_flops
from megamoe.utils.run_folder import last_record

FASTER = 1.5  # how many times the FLOP/s of bf16 those of fp32 must be for fp32 to be chosen


def faster_of(half_flops: float, single_flops: float) -> Choice:
    """fp32 where its GEMMs are so much faster than 16-bit ones that it is worth twice the memory."""
    return "fp32" if single_flops >= FASTER * half_flops else "bf16"


@dataclass(frozen=True)
class Precision:
    """How a run chooses its precision. Rank 0 finds it, for all ranks."""

    faster: Choice  # on this device
    reason: str
    measured: Peak | None = None  # of a CPU: the faster of both rates
    recorded: Choice | None = None  # of the run that is resumed, which keeps it

    @property
    def choice(self) -> Choice:
        """What "auto" stands for."""
        return self.recorded or self.faster

    def describe(self, recipe: Recipe) -> str | None:
        """What was chosen and why, or a warning that the JSON demands the slow one; in one line, if there is one."""
        if not recipe.is_auto:
            if self.faster == "bf16" or recipe.dtype != "bf16":
                return None
            remedy = 'set "bf16": {"enabled": "auto"} there for a new run to take fp32'
            return f"warning: computes in bf16, as {recipe.where} demands, but {self.reason}; {remedy}"
        if self.choice == self.faster:
            return f"computes in {self.choice}: {self.reason}"
        return f"computes in {self.choice}, as the run began; {self.reason}"

    def mfu_peak(self, device: torch.device, dtype: torch.dtype) -> Peak:
        """What MFU is the share of: on a GPU the peak for `dtype`, on a CPU the faster of the measured rates."""
        return self.measured or peak_flops(device, dtype)


def by_rates(half_flops: float, single_flops: float) -> Precision:
    """Of a CPU whose GEMMs run at these rates."""
    half, single = describe_flops(half_flops), describe_flops(single_flops)
    reason = f"GEMMs run at {half} in bf16 and at {single} in fp32 here"
    return Precision(faster_of(half_flops, single_flops), reason, Peak(max(half_flops, single_flops), True))


def precision_of(device: torch.device) -> Precision:
    """Of a GPU by its instructions, of a CPU by what it does in less than a second."""
    if device.type == "cpu":
        return by_rates(*(measured_flops(device, dtype) for dtype in (torch.bfloat16, torch.float32)))
    name = torch.cuda.get_device_name(device)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Precision("bf16", f"{name} has bf16 instructions")
    return Precision("fp32", f"{name} has no bf16 instructions, and fp16 needs a loss scale")


def dtype_to_compute_in(saved: torch.dtype, device: torch.device) -> torch.dtype:
    """Of a model whose weights were saved in `saved`: fp32 where this device multiplies 16-bit matrices slowly."""
    if saved.itemsize < 4 and device.type == "cpu":
        rates = (measured_flops(device, dtype) for dtype in (saved, torch.float32))
        return torch.float32 if faster_of(*rates) == "fp32" else saved
    return saved


def find_precision(device: torch.device, resumed: Path | None = None) -> Precision:
    """What rank 0 finds, and the precision of the run in the folder `resumed`, which keeps it. Collective."""
    found: list[Precision | None] = [None]
    if dist.get_rank() == 0:
        record = None
        with contextlib.suppress(UserError):  # `resume.py` says what is wrong with the folder
            record = last_record(resumed) if resumed else None
        dtype = dtype_of(record.get("deepspeed", {})) if record else None
        found = [replace(precision_of(device), recorded=None if dtype == "fp16" else dtype)]
    dist.broadcast_object_list(found)
    assert found[0]
    return found[0]
