"""What every source of weights without an optimizer says of one."""

from __future__ import annotations

from typing import Any


class WeightsAlone:
    """The members of `reader.Source` that have to do with an optimizer."""

    has_optimizer = False
    state_names: tuple[str, ...] = ()

    def training_state(self) -> dict[str, Any]:
        """Of a source with an optimizer alone."""
        raise AssertionError("weights alone have no training state")
