"""Open files of torch.save so that they can run no code.

Files are opened with `weights_only`. Of the objects that DeepSpeed puts into them besides tensors and plain values none
is made: what they hold comes without their class.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megamoe.utils.errors import UserError

# By DeepSpeed's names: attributes of a scaler; the number of a member of an enum, which is one for the whole process.
STAND_INS: list[Any] = [
    (SimpleNamespace, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (SimpleNamespace, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def safe_load(path: Path) -> Any:
    """torch.load that can run no code; tensors stay on the disk until they are read. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is missing; bring it back, or use an older checkpoint.")
    with safe_globals(STAND_INS):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # damaged files fail in any way
            foreign = _foreign_code(path)
            if foreign:
                raise UserError(
                    f"{path} would call {', '.join(foreign)} when opened, which is not on the list of what a "
                    "checkpoint may hold; it could run foreign code: do not open it, get it from its source again."
                ) from None
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise UserError(
                f"{path} is damaged, or not in the zipped form of torch.save, and cannot be read ({reason}); "
                "use an older checkpoint."
            ) from None


def _foreign_code(path: Path) -> list[str]:
    """What a file that torch refuses asks for beyond what is allowed; nothing where it is too damaged to tell."""
    try:
        return get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return []
