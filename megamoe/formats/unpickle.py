"""Open files of torch.save so that they can run no code.

Files are opened with `weights_only`, and what DeepSpeed puts into them besides tensors and plain values must be on a
short list of harmless classes, with attributes as these give themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megamoe.utils.errors import UserError

# Classes without behaviour that DeepSpeed pickles besides tensors and plain values.
WITH_ATTRIBUTES = [LossScaler, DynamicLossScaler]
# A member of an enum is one for the whole process, and a file could change it: it becomes its number.
ALLOWED = [*WITH_ATTRIBUTES, (int, "deepspeed.runtime.zero.config.ZeroStageEnum")]
PLAIN = (bool, int, float, str, type(None), Tensor, torch.dtype)


def safe_load(path: Path) -> Any:
    """torch.load that can run no code; tensors stay on the disk until they are read. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is missing; bring it back, or use an older checkpoint.")
    with safe_globals(ALLOWED):
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
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
    changed = _changed_object(loaded)
    if changed:
        raise UserError(
            f"{path} holds {changed}, which DeepSpeed does not save; it could lead its loader astray: do not open it, "
            "get it from its source again."
        )
    return loaded


def _changed_object(loaded: Any) -> str | None:
    """The first object in `loaded` with an attribute that is no plain value or hides one of its class, in words."""
    to_see, seen = [loaded], set()
    while to_see:
        value = to_see.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            to_see += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            to_see += value
        elif type(value) in WITH_ATTRIBUTES:
            for name, attribute in vars(value).items():
                if not isinstance(name, str) or hasattr(type(value), name) or not isinstance(attribute, PLAIN):
                    return f"a {type(value).__name__} with {name!r} as a {type(attribute).__name__}"
    return None


def _foreign_code(path: Path) -> list[str]:
    """What a file that torch refuses asks for beyond what is allowed; nothing where it is too damaged to tell."""
    try:
        return get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return []
