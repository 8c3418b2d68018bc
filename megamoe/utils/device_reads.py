"""How the host reads what the device has computed: every read in a training step is a call of this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def begin_read(values: Tensor) -> Callable[[], Any]:
    """Begin to copy `values` to the host. Call what is returned for them, as `Tensor.tolist` gives them: it waits for
    the copy, not for what the device was given to do since."""
    if values.device.type != "cuda":
        return values.tolist
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)  # of a cache, so that it costs little
    on_host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Any:
        copied.synchronize()
        return on_host.tolist()

    return wait
