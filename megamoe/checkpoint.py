"""Checkpoints in DeepSpeed's own format: save, resume at the same topology, read the plain weights.

RUN/checkpoints/step_N/ holds what `engine.save_checkpoint` writes; RUN/checkpoints/latest names the newest.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from megamoe.config import UserError

EXPERT_FILE = re.compile(r"layer_\d+_expert_\d+_mp_rank_00_model_states\.pt")


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path, step: int, ep_size: int) -> Path:
    """Write `folder`/step_N. Collective. The position in the data follows from the step, so the step is all the state
    that the engine does not hold itself."""
    tag = f"step_{step}"
    state = {"ep_size": ep_size, "world_size": engine.world_size}
    engine.save_checkpoint(str(folder), tag=tag, client_state={"megamoe": state})
    return folder / tag


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `folder`/latest names, None if there is none."""
    latest = folder / "latest"
    return folder / latest.read_text().strip() if latest.is_file() else None


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved, from its name."""
    return int(checkpoint.name.removeprefix("step_"))


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, checkpoint: Path, ep_size: int) -> int:
    """Restore weights, optimizer, schedule and router statistics; returns the step. Collective.

    Raises UserError if the checkpoint was saved by another number of ranks or another ep_size.
    """
    saved = _shared_states(checkpoint, mmap=True)["megamoe"]
    here = {"world_size": engine.world_size, "ep_size": ep_size}
    for key, value in here.items():
        if saved[key] != value:
            raise UserError(
                f"checkpoint {checkpoint} was saved with {key} {saved[key]}, not {value}; resume it with "
                f"{saved['world_size']} ranks and --ep_size {saved['ep_size']}."
            )
    engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return step_of(checkpoint)


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's whole state_dict, all experts with their global ids, in the training precision."""
    weights = dict(_shared_states(checkpoint)["module"])
    for file in sorted(checkpoint.iterdir()):
        if EXPERT_FILE.fullmatch(file.name):
            weights.update(torch.load(file, map_location="cpu", weights_only=True))
    return weights


def _shared_states(checkpoint: Path, mmap: bool = False) -> dict[str, Any]:
    """Rank 0's file: the weights outside the experts, the buffers and the state around them."""
    path = checkpoint / "mp_rank_00_model_states.pt"
    try:
        # mmap: only what is used is read.
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"checkpoint {checkpoint} has no {path.name}; give a folder that holds a checkpoint.") from None
