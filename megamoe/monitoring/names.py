"""What a run's values and its configuration are called in trackers, whose pages show a GROUP/ together, and in
reports."""

from __future__ import annotations

import json
from typing import Any

GROUPS = {  # of the names of `log_scalars`; all others belong to train/ or valid/
    "throughput": ("tokens_per_second", "mfu", "memory_gib", "seconds_left"),
    "optimizer": ("lr", "grad_norm", "weight_norm", "skipped_steps", "guarded_steps", "rollbacks"),
    "router": (
        "max_vio", "running_max_vio", "worst_running_max_vio", "dead_experts", "effective_experts",
        "lowest_effective_experts", "router_entropy", "lowest_router_entropy",
    ),
}  # fmt: skip
TEXT, SAMPLES, EXPERT_LOAD = "run/text", "samples", "router/expert_load"
SECRET = ("command", "on_event", "comet")  # keys whose values may hold a password
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def named(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers among the values of `log_scalars` by their names in trackers; what there is of each block
    (NAME_by_block) as NAME/layer_NN."""
    found: dict[str, float] = {}
    for key, value in values.items():
        name = key.removesuffix("_by_block")
        group = _GROUP_OF.get(name.partition("/")[0], kind) if kind == "train" else kind
        name = f"{group}/{name.replace('router_', '') if group == 'router' else name}"
        if isinstance(value, dict):
            found |= {layer(name, int(block)): inner for block, inner in value.items()}
        elif isinstance(value, (int, float)):
            found[name] = value
    return found


def layer(name: str, block: int) -> str:
    """Name of a value of one block."""
    return f"{name}/layer_{block:02d}"


def flat_config(record: dict[str, Any], where: str = "") -> dict[str, bool | int | float | str]:
    """A run's record by the paths of its keys, such as `model.hidden_size`, without what may be secret. Lists are JSON;
    what is None is left out."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if key in SECRET or value is None:
            continue
        if isinstance(value, dict):
            found |= flat_config(value, f"{where}{key}.")
        else:
            found[where + key] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return found
