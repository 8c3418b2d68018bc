"""The sections of the DeepSpeed JSON, each with its keys and their kinds.

A key that is not here is an error that names the nearest known one: DeepSpeed ignores it, or has it for ZeRO-3 alone.
Keys inside flops_profiler and timers are not checked. A default that is None stands for a key that nothing here reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from megamoe.config.model import JsonModel
from megamoe.utils.errors import shown

Dtype = Literal["bf16", "fp16", "fp32"]
Number = Annotated[float, Field(ge=0)]
Whole = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Unread: Any = Field(default=None)


class BatchSizes(JsonModel):
    """Three keys of no section, of which any may be left out that follow from the others."""

    train_batch_size: Count | None = None
    train_micro_batch_size_per_gpu: Count | None = None
    gradient_accumulation_steps: Count | None = None


class TopLevel(BatchSizes):
    """The keys of no section, and the sections, which are checked one by one."""

    gradient_clipping: Number = Unread
    communication_data_type: Dtype | None = None
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = Unread
    prescale_gradients: bool = Unread
    zero_allow_untested_optimizer: bool = Unread
    zero_force_ds_cpu_optimizer: bool = Unread
    wall_clock_breakdown: bool = Unread
    memory_breakdown: bool = Unread
    dump_state: bool = Unread
    steps_per_print: Count = Unread
    flops_profiler: dict[str, Any] = Unread
    optimizer: Any = None
    scheduler: Any = None
    timers: dict[str, Any] = Unread
    bf16: Any = None
    fp16: Any = None
    zero_optimization: Any = None
    data_types: Any = None
    comms_logger: Any = None
    tensorboard: Any = None
    wandb: Any = None
    csv_monitor: Any = None


class Optimizer(JsonModel):
    type: Any = None
    params: Any = None


class Bf16(JsonModel):
    enabled: bool = False
    check_grad_overflow: bool = True
    immediate_grad_update: bool = Unread


class Fp16(JsonModel):
    enabled: bool = False
    loss_scale: Number | None = None
    initial_scale_power: Whole = Unread
    hysteresis: Whole = Unread
    loss_scale_window: Count = Unread
    min_loss_scale: Number = Unread
    auto_cast: bool = Unread
    consecutive_hysteresis: bool = Unread


class Zero(JsonModel):
    stage: int = Field(default=0, validate_default=True)
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    overlap_comm: bool = False
    reduce_bucket_size: Whole = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    offload_optimizer: Any = None
    round_robin_gradients: bool = False
    allgather_partitions: bool = Unread
    allgather_bucket_size: Whole = Unread
    ignore_unused_parameters: bool = Unread

    @field_validator("stage")
    @classmethod
    def _trains(cls, stage: int) -> int:
        if stage not in (1, 2):
            reason = "DeepSpeed refuses ZeRO-3 with its MoE layer" if stage == 3 else "megamoe trains with 1 or 2"
            raise ValueError(f"it is {stage}, but {reason}; set it to 1 or 2.")
        return stage

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's states and its step are the host's; DeepSpeed does the same under every device that
        it offloads to with ZeRO-1 and ZeRO-2."""
        return (self.offload_optimizer or {}).get("device", "none") != "none"


class Offload(JsonModel):
    device: str = "none"
    pin_memory: bool = Unread


class DataTypes(JsonModel):
    grad_accum_dtype: Dtype | None = None


class CommsLogger(JsonModel):
    enabled: bool = False
    verbose: bool = False
    debug: bool = False
    prof_all: bool = True
    prof_ops: list[str] = Field(default=[])

    @field_validator("verbose", "debug", "prof_all", "prof_ops")
    @classmethod
    def _changes_nothing(cls, value: Any, info: Any) -> Any:
        if value != cls.model_fields[info.field_name].default:
            raise ValueError(f"it is {shown(value)}, but one table at the end has all operations; leave it out.")
        return value


class TrackerSection(JsonModel):
    enabled: bool = False
    """The same as --trackers."""

    def settings(self, folder: Path) -> dict[str, Any]:
        """What the tracker is built with; `folder` is for its files, unless the section names another."""
        return self.model_dump(exclude={"enabled"})


class FileTracker(TrackerSection):
    output_path: str = ""
    """Folder in place of the run folder, relative to where the run is started."""
    job_name: str | None = None
    """Folder in `output_path`; by default the name of the run folder."""

    def settings(self, folder: Path) -> dict[str, Any]:
        own = Path(self.output_path, self.job_name or folder.parent.name)
        return {"folder": own if self.output_path else folder}


class TensorBoard(FileTracker):
    enabled: bool = True
    """Written unless this is false."""


class Wandb(TrackerSection):
    group: str | None = None
    """Runs that W&B shows together."""
    team: str | None = None
    """W&B's entity; by default that of the user."""
    project: str | None = None
    """By default WANDB_PROJECT, else megamoe."""


# DeepSpeed's monitors, for which our trackers stand: it is not given these sections.
TRACKER_SECTIONS: dict[str, type[JsonModel]] = {"tensorboard": TensorBoard, "wandb": Wandb, "csv_monitor": FileTracker}
# By their place in the JSON. `schedule.py` has the scheduler's.
SECTIONS: dict[str, type[JsonModel]] = {
    "bf16": Bf16,
    "fp16": Fp16,
    "zero_optimization": Zero,
    "zero_optimization.offload_optimizer": Offload,
    "data_types": DataTypes,
    "comms_logger": CommsLogger,
    "optimizer": Optimizer,
    **TRACKER_SECTIONS,
}

# Sections that would do nothing here, or half of what they say, and what to use instead.
REFUSED = {
    "comet": "the trackers are TensorBoard, wandb, trackio and csv (--trackers): leave it out",
    "activation_checkpointing": "--recompute_blocks N says which blocks recompute theirs: leave it out",
}


def refused_problems(values: dict[str, Any]) -> list[str]:
    """That a section is there which would do nothing, unless it is disabled, one sentence each."""
    return [
        f'"{name}" is {shown(values[name])}, but it is not used; {reason}.'
        for name, reason in REFUSED.items()
        if name in values and not (isinstance(values[name], dict) and values[name].get("enabled") is False)
    ]
