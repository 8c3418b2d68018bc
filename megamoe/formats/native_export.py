"""Write a model as a class of transformers, under the names of published files: it loads without code of ours."""

from __future__ import annotations

from pathlib import Path

import torch

from megamoe.config.model import ModelConfig
from megamoe.formats.architectures import BIAS, Architecture
from megamoe.formats.config_json import fitting, nearest, write_config
from megamoe.formats.export import write_directory
from megamoe.formats.source import Source, View
from megamoe.formats.tensor_names import written_names
from megamoe.model.names import is_buffer
from megamoe.utils.errors import shown


def native_class(source: Source, config: ModelConfig, keep_mtp: bool = False) -> tuple[Architecture | None, str]:
    """The class of transformers that holds the model, and a sentence that says which, or why none does.

    Args:
        keep_mtp: multi-token prediction, where the model has it, must have a place too.
    """
    architecture = fitting(config)
    if architecture is None:
        near, fields = nearest(config)
        held = ", ".join(f"{name} {shown(getattr(config, name))}" for name in fields)
        return None, f"no class of transformers holds the model: {near.name} is the nearest, but for {held}"
    largest = max((bias.abs().max().item() for name, bias in source.buffers.items() if name.endswith(BIAS)), default=0)
    if largest and not architecture.has_bias:
        return None, (
            f"{architecture.name} holds the model but for its balancing bias, which is up to {largest:.2g} "
            "(router_bias), and no other class of transformers does"
        )
    if keep_mtp and config.num_nextn_predict_layers and not architecture.mtp:
        return None, (
            f"{architecture.name} holds the model but for its multi-token prediction (num_nextn_predict_layers), which "
            "--keep_mtp keeps"
        )
    return architecture, f"the model is one of transformers: {architecture.name}"


def native_view(source: Source, config: ModelConfig, architecture: Architecture, keep_mtp: bool) -> View:
    """A source under the class's names. A model without balancing biases has zeros there."""
    names = written_names(architecture, config, keep_mtp)
    zeros = torch.zeros(config.num_local_experts)
    buffers = {name: source.buffers.get(plain, zeros) for name, plain in names.items() if is_buffer(plain)}
    return View(source, {name: plain for name, plain in names.items() if name not in buffers}, buffers)


def write_native(
    source: Source,
    out: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    config: ModelConfig,
    architecture: Architecture,
    tokenizer: Path | None,
    keep_mtp: bool = False,
) -> None:
    """A directory of the class. Biases of the router are fp32 whatever the dtype.

    Args:
        keep_mtp: write the weights of multi-token prediction too, as the layer after the last.
    """
    values, view = write_config(architecture, config, keep_mtp), native_view(source, config, architecture, keep_mtp)
    write_directory(view, out, dtype, shard_bytes, config, tokenizer, values)
