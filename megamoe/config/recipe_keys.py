"""The keys of the DeepSpeed JSON, by section, and what each takes.

A key that is not here is an error that names the nearest known one; DeepSpeed ignores what it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from megamoe.utils.errors import shown, unknown_key


class Kind(NamedTuple):
    """What a key takes."""

    words: str
    fits: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return is_number(value) and value == int(value)  # 5e8 is one


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number of at least 0", lambda value: is_number(value) and value >= 0)
ABOVE_0 = Kind("a number above 0", lambda value: is_number(value) and value > 0)
WHOLE = Kind("a whole number of at least 0", lambda value: _is_whole(value) and value >= 0)
COUNT = Kind("a whole number of at least 1", lambda value: _is_whole(value) and value >= 1)
TEXT = Kind("a text", lambda value: isinstance(value, str) and value != "auto")
OBJECT = Kind("an object of settings", lambda value: isinstance(value, dict))
RULED = Kind("what `recipe.py` has a rule for", lambda _: True)

# "" is the top level; the keys of optimizer.params depend on the optimizer (`optimizers.py`), those of scheduler.params
# on the type (`schedule.py`). Of a section that is not listed DeepSpeed checks the keys.
DS_KEYS: dict[str, dict[Kind, str]] = {
    "": {
        FLAG: "prescale_gradients zero_allow_untested_optimizer zero_force_ds_cpu_optimizer wall_clock_breakdown "
        "memory_breakdown dump_state",
        COUNT: "steps_per_print",
        ABOVE_0: "gradient_predivide_factor",
        TEXT: "communication_data_type",
        OBJECT: "aio flops_profiler timers",
        RULED: "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping "
        "optimizer scheduler bf16 fp16 zero_optimization data_types keep_in_fp32_modules comms_logger tensorboard "
        "wandb comet csv_monitor activation_checkpointing",
    },
    "optimizer": {RULED: "type params"},
    "scheduler": {RULED: "type params"},
    "bf16": {
        FLAG: "check_grad_overflow immediate_grad_update bf16_optimizer_states bf16_master_weights_and_grads",
        RULED: "enabled",
    },
    "fp16": {
        FLAG: "auto_cast consecutive_hysteresis fp16_master_weights_and_grads",
        WHOLE: "initial_scale_power hysteresis",
        COUNT: "loss_scale_window",
        NUMBER: "min_loss_scale",
        RULED: "enabled loss_scale",
    },
    "zero_optimization": {
        FLAG: "contiguous_gradients reduce_scatter allgather_partitions overlap_comm round_robin_gradients cpu_offload "
        "elastic_checkpoint ignore_unused_parameters use_multi_rank_bucket_allreduce load_from_fp32_weights",
        WHOLE: "reduce_bucket_size allgather_bucket_size sub_group_size",
        RULED: "stage offload_optimizer",
    },
    "zero_optimization.offload_optimizer": {
        FLAG: "pin_memory pipeline_read pipeline_write fast_init",
        WHOLE: "buffer_count",
        NUMBER: "ratio",
        TEXT: "device nvme_path",
    },
    "data_types": {RULED: "grad_accum_dtype"},
    "timers": {OBJECT: "throughput"},
    "timers.throughput": {FLAG: "enabled synchronized"},
}  # fmt: skip
OPTIMIZER_PARAMS = {
    NUMBER: "lr adam_lr eps weight_decay alpha",
    FLAG: "torch_adam adam_w_mode fused foreach bias_correction",
}

LOGS = "megamoe always writes losses and MaxVio to tensorboard/ and log.jsonl in the run folder: leave it out"
# Sections that would do nothing here, or half of what they say, and what to use instead.
REFUSED = {
    **dict.fromkeys(("tensorboard", "wandb", "comet", "csv_monitor"), LOGS),
    "comms_logger": "nothing prints its summary; tools/plan.py says what each collective sends: leave it out",
    "activation_checkpointing": "--recompute_blocks N says which blocks recompute theirs: leave it out",
}


def key_problems(section: Any, name: str, where: str) -> list[str]:
    """Unknown keys and values of the wrong kind in the section called `name` and those below it, one sentence each."""
    if name not in DS_KEYS:
        return []
    kinds = {key: kind for kind, keys in DS_KEYS[name].items() for key in keys.split()}
    if not isinstance(section, dict):
        return [f'{where}: "{name}" is {shown(section)}; give an object with {", ".join(sorted(kinds))}.']
    problems = []
    for key, value in section.items():
        inner = f"{name}.{key}" if name else key
        if key not in kinds:
            problems.append(unknown_key(f"{where}: {name}" if name else where, key, kinds))
        elif inner in REFUSED and not (isinstance(value, dict) and value.get("enabled") is False):
            problems.append(f'{where}: "{inner}" is not used; {REFUSED[inner]}.')
        else:
            problems += value_problems(kinds[key], inner, value, where)
            problems += key_problems(value, inner, where)
    return problems


def value_problems(kind: Kind, name: str, value: Any, where: str) -> list[str]:
    """That `value` is not of its kind, in a sentence, or nothing."""
    return (
        []
        if kind.fits(value)
        else [f"{where}: {name} is {shown(value)}{why(value)}; give {kind.words}, or leave it out."]
    )


def why(value: Any) -> str:
    """What is wrong with a value that other tools take, as a clause."""
    if value == "auto":
        return ", which only Hugging Face's Trainer fills in"
    if isinstance(value, str) and value:
        return ", a text in quotes"
    return ""
