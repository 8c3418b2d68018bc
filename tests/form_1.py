"""Checkpoints of form 1, DeepSpeed's files under a manifest, and code planted in such files."""

import json
import os
from pathlib import Path

from megamoe.checkpoint import manifest

RUN = Path(__file__).parent / "checkpoint" / "run_before_packages"
CHECKPOINT = RUN / "checkpoints" / "step_3"  # of two ranks, ep_size 2


def seal(checkpoint, record):
    """Make what DeepSpeed has saved at step 3 a checkpoint of form 1."""
    (checkpoint / "run.json").write_text(json.dumps(record))
    files = {path.name: manifest.file_record(path) for path in checkpoint.iterdir()}
    manifest.seal(checkpoint, {"step": 3}, files)


class Malicious:
    """Leaves a mark where it is unpickled without care."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)
