"""What a model costs: its parameters, as it says itself without values, and floating-point operations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch

from megamoe.config.model import ModelConfig
from megamoe.model.decoder import Decoder
from megamoe.model.names import EMBEDDING, HEAD, expert_id, plain_parts

Shape = tuple[int, ...]


@lru_cache(32)  # a search of the planner asks for the same ones hundreds of times
def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter of the model under its plain name, in the model's order. Not to be changed."""
    with torch.device("meta"):
        model = Decoder(config, seed=None)
    return {
        part.name: part.shape
        for name, weight in model.named_parameters()
        for part in plain_parts(name, tuple(weight.shape))
    }


def parameter_count(config: ModelConfig) -> int:
    """All parameters of the model, over all ranks."""
    return sum(map(math.prod, parameter_shapes(config).values()))


def active_parameter_count(config: ModelConfig) -> int:
    """Those that compute one token: all but the experts that it is not sent to."""
    return _active(config, parameter_shapes(config))


def _active(config: ModelConfig, shapes: Mapping[str, Shape]) -> int:
    """Weights in parameters of these shapes that meet one token."""
    experts = sum(math.prod(shape) for name, shape in shapes.items() if expert_id(name) is not None)
    elsewhere = experts - experts * config.num_experts_per_tok // config.num_local_experts
    return sum(map(math.prod, shapes.values())) - elsewhere


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of forward and backward per token, recomputation not counted.

    2 per weight and token forward, twice that backward; the experts count K times, not E. Attention's two products
    are counted over the positions that a query sees: half of all (causal), or the last ones of a sliding window, and
    all latents. The convention is that of PaLM (arXiv:2204.02311, appendix B), with the causal half.
    """
    mtp = config.num_nextn_predict_layers  # 0 or 1
    windows = [config.window(block) for block in range(config.num_hidden_layers)] + [config.window(-1)] * mtp
    visible = sum(visible_positions(seq_len, window) + config.num_latent_tokens for window in windows)
    attention = visible * config.num_attention_heads * (config.head_dim + config.value_dim)
    heads = (1 + mtp) * config.vocab_size * config.hidden_size
    matrices = {
        name: shape
        for name, shape in parameter_shapes(config).items()
        if len(shape) == 2 and name not in (EMBEDDING, HEAD) and not name.endswith(".latents")
    }
    return 6.0 * (attention + _active(config, matrices) + heads)


def visible_positions(seq_len: int, window: int | None) -> float:
    """Positions that a query sees in the mean, without latents."""
    if window is None or window >= seq_len:
        return seq_len / 2
    return window - window**2 / (2 * seq_len)
