"""The model that a command is given, and its tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer

from megamoe.checkpoint.opening import OpenModel, open_model, tokenizer_of
from megamoe.commands.options import Chat, ModelOptions
from megamoe.config.precision import dtype_to_compute_in
from megamoe.data.tokenizer import end_of_text_id, load_tokenizer, tokenizer_file
from megamoe.formats.config_json import find_preset
from megamoe.model.decoder import Decoder


def open_given(options: ModelOptions) -> OpenModel:
    return open_model(options.model, find_preset(options.preset) if options.preset else None, ema=options.ema)


def load(options: Chat) -> tuple[Decoder, Tokenizer, dict[str, Any]]:
    """The model on the device that there is, its tokenizer, and how `generation.stream` is to draw, but for the
    seed. Raises UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_given(options)
    file = tokenizer_file(options.tokenizer or tokenizer_of(options.model))
    tokenizer = load_tokenizer(file, model.config.vocab_size)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    sampling["end_of_text"] = end_of_text_id(tokenizer, options.end_of_text)
    return model.load(dtype_to_compute_in(model.dtype, device), device), tokenizer, sampling
