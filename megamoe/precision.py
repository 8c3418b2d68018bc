"""The faster precision of a device: what `"bf16": {"enabled": "auto"}` in a DeepSpeed JSON stands for.

bf16 takes half the memory of fp32 and is the faster one on GPUs and recent server processors. A processor without bf16
instructions, as in most laptops, multiplies bf16 matrices up to a hundred times slower than fp32 ones.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megamoe.ds_config import dtype_of, section_of
from megamoe.errors import UserError
from megamoe.hardware import Device, Peak, describe_flops, peak_flops
from megamoe.run_folder import last_record

FASTER = 1.5  # how many times the FLOP/s of bf16 those of fp32 must be for fp32 to be chosen


def is_fp32_faster(half: Peak, single: Peak) -> bool:
    """Whether fp32 is so much faster than a 16-bit dtype that it is worth twice the memory."""
    return single.flops >= FASTER * half.flops


@dataclass(frozen=True)
class GemmRates:
    """Peak FLOP/s of matrix products on this rank's device."""

    bf16: Peak
    fp32: Peak

    @property
    def choice(self) -> Literal["bf16", "fp32"]:
        """The precision that "auto" stands for here."""
        return "fp32" if is_fp32_faster(self.bf16, self.fp32) else "bf16"

    def mfu_peak(self, device: torch.device, dtype: torch.dtype) -> Peak:
        """What MFU is the share of: the data sheet's peak for `dtype`, or else the faster of the measured rates."""
        if dtype == torch.float16:
            return peak_flops(device, dtype)
        own = self.fp32 if dtype == torch.float32 else self.bf16
        return max(self.bf16, self.fp32, key=lambda peak: peak.flops) if own.is_measured else own

    def __str__(self) -> str:
        bf16, fp32 = describe_flops(self.bf16.flops), describe_flops(self.fp32.flops)
        source = "here" if self.bf16.is_measured else "by the data sheet"
        return f"matrix products run at {bf16} in bf16 and at {fp32} in fp32 {source}"


def gemm_rates(device: torch.device) -> GemmRates:
    """Of the data sheet where the device is known, else measured in less than a second."""
    return GemmRates(peak_flops(device, torch.bfloat16), peak_flops(device, torch.float32))


def planned_rates(device: Device) -> GemmRates:
    """Of a device that is planned for."""
    is_measured = device.multiprocessors == 0  # a CPU, this one
    return GemmRates(Peak(device.half_flops, is_measured), Peak(device.single_flops, is_measured))


def is_auto(ds: dict[str, Any]) -> bool:
    """Whether a DeepSpeed JSON leaves the choice between bf16 and fp32 to the device."""
    return section_of(ds, "bf16").get("enabled") == "auto" and section_of(ds, "fp16").get("enabled") is not True


def resolve(ds: dict[str, Any], choice: Literal["bf16", "fp32"]) -> dict[str, Any]:
    """The DeepSpeed JSON with `choice` in place of "auto", which DeepSpeed itself takes for fp32."""
    return {**ds, "bf16": {**ds["bf16"], "enabled": choice == "bf16"}} if is_auto(ds) else ds


def dtype_to_compute_in(saved: torch.dtype, device: torch.device) -> torch.dtype:
    """Of a model whose weights were saved in `saved`: fp32 where this device multiplies 16-bit matrices slowly."""
    if saved.itemsize < 4 and device.type == "cpu":
        half, single = (peak_flops(device, dtype) for dtype in (saved, torch.float32))
        return torch.float32 if is_fp32_faster(half, single) else saved
    return saved


@dataclass(frozen=True)
class Precision:
    """How a run chooses its precision. Rank 0 finds it, for all ranks."""

    rates: GemmRates
    recorded: Literal["bf16", "fp32"] | None = None  # of the run that is resumed, which keeps it

    @property
    def choice(self) -> Literal["bf16", "fp32"]:
        return self.recorded or self.rates.choice

    def describe(self, ds: dict[str, Any], where: str) -> str | None:
        """What was chosen and why, or a warning that the JSON demands the slow one; in one line, if there is one.

        Args:
            ds: the DeepSpeed JSON as the user wrote it.
            where: its path.
        """
        is_slow = self.rates.choice == "fp32"
        if not is_auto(ds):
            remedy = f'set "bf16": {{"enabled": "auto"}} in {where} for a new run to take fp32'
            return f"warning: {self.rates}; {remedy}" if is_slow and dtype_of(ds) == "bf16" else None
        if self.choice == self.rates.choice:
            return f"computes in {self.choice}: {self.rates}"
        return f"computes in {self.choice}, as the run began; {self.rates}"


def find_precision(device: torch.device, resumed: Path | None = None) -> Precision:
    """What rank 0 measures, and the precision of the run in the folder `resumed`, which keeps it. Collective."""
    found: list[Precision | None] = [None]
    if dist.get_rank() == 0:
        record = None
        with contextlib.suppress(UserError):  # `Job` says what is wrong with the folder
            record = last_record(resumed) if resumed else None
        dtype = dtype_of(record.get("deepspeed", {})) if record else None
        found = [Precision(gemm_rates(device), None if dtype == "fp16" else dtype)]
    dist.broadcast_object_list(found)
    assert found[0]
    return found[0]
