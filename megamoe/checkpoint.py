"""Checkpoints in DeepSpeed's own format: save, resume at the same topology, read the plain weights.

RUN/checkpoints/step_N/ holds what `engine.save_checkpoint` writes; RUN/checkpoints/latest names the newest.
"""

from __future__ import annotations

import re
from pathlib import Path

import deepspeed
import torch
from torch import Tensor

from megamoe.config import UserError

EXPERT_FILE = re.compile(r"layer_\d+_expert_\d+_mp_rank_00_model_states\.pt")


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path, step: int) -> Path:
    """Write `folder`/step_N. Collective. The position in the data and all random numbers follow from the step, so its
    number is all the state that the engine does not hold itself."""
    tag = f"step_{step}"
    engine.save_checkpoint(str(folder), tag=tag)
    return folder / tag


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `folder`/latest names, None if there is none."""
    latest = folder / "latest"
    return folder / latest.read_text().strip() if latest.is_file() else None


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved, from its name."""
    return int(checkpoint.name.removeprefix("step_"))


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, checkpoint: Path) -> int:
    """Restore weights, optimizer, schedule and router statistics, saved by as many ranks with the same ep_size; returns
    the step. Collective."""
    engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return step_of(checkpoint)


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's whole state_dict, all experts with their global ids, in the training precision.

    Raises UserError if rank 0's file, which holds all but the experts, is not there.
    """
    path = checkpoint / "mp_rank_00_model_states.pt"
    if not path.is_file():
        raise UserError(f"checkpoint {checkpoint} has no {path.name}; give a folder that holds a checkpoint.")
    weights = dict(torch.load(path, map_location="cpu", weights_only=False)["module"])
    for file in sorted(checkpoint.iterdir()):
        if EXPERT_FILE.fullmatch(file.name):
            weights.update(torch.load(file, map_location="cpu", weights_only=True))
    return weights
