"""Layers out of a configuration: a preset and the configuration of an exported model have fields of the same names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Layer = TypeVar("Layer")


def from_config(layer: Callable[..., Layer], config: Any, **own: Any) -> Layer:
    """A layer whose keywords are the fields of `config` of the same names, but for those that are given here.

    Raises AttributeError for a keyword that is neither.
    """
    names = inspect.signature(layer).parameters.keys() - own.keys()
    return layer(**{name: getattr(config, name) for name in names}, **own)
