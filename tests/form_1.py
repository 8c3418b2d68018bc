"""Checkpoints of form 1, DeepSpeed's files under a manifest; an engine that DeepSpeed can save; code planted in such
files."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from deepspeed.moe.experts import Experts
from engines import make
from torch import nn

from megamoe.checkpoint import manifest

RUN = Path(__file__).parent / "checkpoint" / "run_before_packages"
CHECKPOINT = RUN / "checkpoints" / "step_3"  # of two ranks, ep_size 2


def seal(checkpoint, record):
    """Make what DeepSpeed has saved at step 3 a checkpoint of form 1."""
    (checkpoint / "run.json").write_text(json.dumps(record))
    files = {path.name: manifest.file_record(path) for path in checkpoint.iterdir()}
    manifest.seal(checkpoint, {"step": 3}, files)


class Expert(nn.Module):
    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.up_proj(x)))


class DeepSpeedsExperts(Experts):
    """One parameter per expert and projection, where megamoe's experts are stacked."""

    def __init__(self, *, num_experts, hidden_size, expert_size, **_):
        super().__init__(Expert(hidden_size, expert_size), num_experts)

    def forward(self, rows, ends):
        (experts,) = self.children()
        blocks = rows.tensor_split(ends[:-1].tolist())
        return torch.cat([expert(block) for expert, block in zip(experts, blocks, strict=True)])


def make_for_deepspeed(ep_size, **ds_changes):
    """The engine of this rank as megamoe had it before its experts were stacked: DeepSpeed saves no other."""
    with patch("megamoe.model.block.StackedExperts", DeepSpeedsExperts):
        return make(ep_size, **ds_changes)


class Malicious:
    """Leaves a mark where it is unpickled without care."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)
