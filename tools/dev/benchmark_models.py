"""What the benchmark compares, ready to train: megamoe, the same model with DeepSpeed's own MoE layer, and Mixtral,
alone and with DeepSpeed's AutoEP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.moe.layer
import torch
import torch.distributed as dist
from torch import nn

from megamoe.config.model import ModelConfig
from megamoe.config.recipe import read_recipe
from megamoe.data.batches import Batch
from megamoe.launch.distributed import is_on_cpu
from megamoe.model.decoder import Decoder
from megamoe.model.dropout import Dropout
from megamoe.model.feed_forward import MLP
from megamoe.model.from_config import from_config
from megamoe.model.topology import ExpertTopology
from megamoe.training.engine import build_engine
from megamoe.training.step import TrainStep, build_train_step


@dataclass
class Contender:
    """A model with its optimizer, ready to train."""

    model: nn.Module
    dtype: torch.dtype
    forward_backward: Callable[[torch.Tensor], None]  # of ids (B, T)
    update: Callable[[], None]
    optimizer: torch.optim.Optimizer  # torch's own, inside whatever wraps it


def build_engine_contender(
    config: ModelConfig,
    ds_config: str,
    ep_size: int,
    samples: int,
    recompute_blocks: int,
    stock: bool,
    compiled: bool = False,
) -> Contender:
    """The decoder in DeepSpeed's engine, as pretrain.py builds it; `stock` puts DeepSpeed's MoE layer into it,
    `compiled` compiles its blocks. A step has `samples` sequences on a rank, whatever the JSON says."""
    recipe = read_recipe(ds_config, dist.get_world_size(), is_on_cpu(), "bf16").replaced(batch_of(samples))
    if stock:
        model = stock_model(config, ep_size, recompute_blocks)
        train_step = TrainStep(build_engine(model, recipe), balancer=None)
    else:
        train_step = build_train_step(
            config, recipe, ep_size=ep_size, recompute_blocks=recompute_blocks, compiled=compiled
        )
    dtype = next(train_step.model.parameters()).dtype

    def forward_backward(ids: torch.Tensor) -> None:
        train_step.forward_backward([Batch(ids, ids)])

    def update() -> None:
        train_step.update()

    return Contender(train_step.model, dtype, forward_backward, update, inner_optimizer(train_step.engine))


def batch_of(samples: int) -> dict[str, int | None]:
    """Changes of a DeepSpeed JSON, by which a step has so many sequences on a rank."""
    return {"train_micro_batch_size_per_gpu": samples, "gradient_accumulation_steps": 1, "train_batch_size": None}


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's own, inside what wraps it."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def stock_model(config: ModelConfig, ep_size: int, recompute_blocks: int) -> Decoder:
    """The decoder with DeepSpeed's own MoE layer in every block."""
    topology = ExpertTopology(config.num_local_experts, ep_size, dist.get_world_size(), dist.get_rank())
    model = Decoder(config, 0, topology, recompute_blocks)
    expert = from_config(MLP, config, intermediate_size=config.expert_size)
    for block in model.layers:
        block.moe = deepspeed.moe.layer.MoE(
            config.hidden_size,
            nn.Sequential(expert, Dropout(config.expert_dropout)),  # copied for each expert
            num_experts=config.num_local_experts,
            ep_size=ep_size,
            k=config.num_experts_per_tok,
            drop_tokens=False,
        )
    return model


def mixtral_of(config: ModelConfig) -> Any:
    """Its experts have three matrices where the decoder's have two, so they are two thirds as wide inside. They run as
    transformers chooses (`grouped_mm` where torch has it)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = MixtralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.expert_size * 2 // 3 // 16 * 16,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        num_local_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    return MixtralForCausalLM(shape)


def build_mixtral(config: ModelConfig, ds_config: str, device: torch.device) -> Contender:
    """Mixtral on one rank with torch's optimizer, without DeepSpeed."""
    dtype = read_recipe(ds_config, 1, device.type == "cpu", "bf16").torch_dtype
    model = mixtral_of(config).to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def forward_backward(ids: torch.Tensor) -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    return Contender(model, dtype, forward_backward, update, optimizer)


def build_autoep(config: ModelConfig, ds_config: str, ep_size: int, samples: int) -> Contender:
    """Mixtral in DeepSpeed's engine, its experts split by DeepSpeed's AutoEP."""
    recipe = read_recipe(ds_config, dist.get_world_size(), is_on_cpu(), "bf16").replaced(batch_of(samples))
    autoep = {"enabled": True, "autoep_size": ep_size, "preset_model": "mixtral"}
    let_autoep_record()
    engine, *_ = deepspeed.initialize(model=mixtral_of(config), config={**recipe.json, "expert_parallel": autoep})

    def forward_backward(ids: torch.Tensor) -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)

    return Contender(engine.module, recipe.torch_dtype, forward_backward, engine.step, inner_optimizer(engine))


def let_autoep_record() -> None:
    """AutoEP of DeepSpeed 0.19.8 takes a registry of transformers for a plain dictionary, which it is not from 5.23 on
    (`auto_ep_presets/base.py`, line 326)."""
    from transformers.utils import output_capturing

    kind = type(output_capturing._CAN_RECORD_REGISTRY)

    def name_of(key: Any) -> Any:
        return str(type(key)) if isinstance(key, nn.Module) else key

    def get(registry: dict[Any, Any], key: Any, default: Any = None) -> Any:
        return dict.get(registry, name_of(key), default) or {}

    def put(registry: dict[Any, Any], key: Any, value: Any) -> None:
        dict.__setitem__(registry, name_of(key), value)

    if kind is not dict:
        kind.get, kind.__setitem__ = get, put  # type: ignore[method-assign, assignment]
