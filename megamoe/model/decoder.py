"""The decoder: embedding, blocks of attention and mixture of experts, tied head, and the loss.

Shape legend: B batch, T positions of this call, S positions so far (cached and new), D hidden_size, V vocab_size.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megamoe.config import ModelConfig
from megamoe.model.attention import GroupedQueryAttention, LayerCache, attention_mask
from megamoe.model.compiled import CompiledBlock
from megamoe.model.experts import StackedExperts
from megamoe.model.loss import chunked_cross_entropy
from megamoe.model.moe import MoE
from megamoe.model.names import expert_id, is_norm, is_residual_projection, layer_id, plain_parts
from megamoe.model.rope import Rotary, rope_frequencies, rotary_table
from megamoe.model.router import Router
from megamoe.model.sections import AttentionSection, ExpertSection, RouterSection, section
from megamoe.topology import ExpertTopology


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: ModelConfig, topology: ExpertTopology):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = GroupedQueryAttention(**section(AttentionSection, config))
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.moe = MoE(
            router=Router(**section(RouterSection, config)),
            experts=StackedExperts(num_experts=topology.experts_per_rank, **section(ExpertSection, config)),
            topology=topology,
            hidden_size=config.hidden_size,
        )
        self.compiled: CompiledBlock | None = None  # what training runs instead, see `Decoder.compile_blocks`

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, used_token: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        if self.compiled and self.training and mask is None and cache is None:
            return self.compiled(self, x, rotary)
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.moe(self.post_attention_layernorm(x), used_token)[0]


class Decoder(nn.Module):
    """The language model; of every layer's experts it holds those of its topology."""

    def __init__(
        self, config: ModelConfig, seed: int = 0, topology: ExpertTopology | None = None, recompute_blocks: int = 0
    ):
        """
        Args:
            seed: of the initial weights, which do not depend on the topology.
            topology: of this rank; None holds all experts.
            recompute_blocks: number of blocks, from the first on, of which only the input is kept for the backward
                pass, which recomputes the rest.
        """
        super().__init__()
        self.config = config
        self.topology = topology or ExpertTopology(config.num_local_experts)
        self.recompute_blocks = recompute_blocks
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, self.topology) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._init_weights(seed)

    @torch.no_grad()
    def _init_weights(self, seed: int) -> None:
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)

        shared = _generator(seed)
        own: dict[tuple[int, int], torch.Generator] = {}  # an expert's, for its projections one after the other
        for name, parameter in self.named_parameters():
            for part in plain_parts(name, parameter.shape, self.topology.first_expert):
                weight = parameter.flatten()[part.start : part.start + part.count].view(part.shape)
                layer, expert = layer_id(part.name), expert_id(part.name)
                if layer is None or expert is None:
                    generator = shared
                else:
                    generator = own[layer, expert] = own.get((layer, expert)) or _generator(seed, layer, expert)
                if not is_norm(part.name):
                    weight.normal_(0, residual_std if is_residual_projection(part.name) else std, generator=generator)

    def compile_blocks(self) -> None:
        """Let all blocks train as one `CompiledBlock`, which compiles when the first batch comes."""
        compiled = CompiledBlock()
        for block in self.layers:
            cast(Block, block).compiled = compiled

    def moe_layers(self) -> list[MoE]:
        """The expert layer of each block, first block first."""
        return [cast(Block, block).moe for block in self.layers]

    def routers(self) -> list[Router]:
        """The router of each block, first block first."""
        return [moe.router for moe in self.moe_layers()]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or with `labels` the mean loss.

        Args:
            input_ids: (B, T) token ids.
            labels: (B, T), the id that follows each position; -100 where none counts. The loss is the mean
                cross-entropy in nats over the others (0 if there are none), in fp32.
            attention_mask: (B, S) bool, False at padding, left or right; None means no padding.
            cache: from `new_cache`; the call's tokens are appended to it.
        """
        hidden = self._hidden_states(input_ids, attention_mask, cache)
        if labels is None:
            return F.linear(hidden, self.embed_tokens.weight)
        return chunked_cross_entropy(hidden.flatten(0, 1), self.embed_tokens.weight, labels.flatten())

    def new_cache(self, capacity: int) -> list[LayerCache]:
        """An empty key/value cache for sequences of up to `capacity` tokens."""
        return [LayerCache(self.config.num_latent_tokens + capacity) for _ in self.layers]

    def _hidden_states(self, input_ids: Tensor, token_mask: Tensor | None, cache: list[LayerCache] | None) -> Tensor:
        batch, length = input_ids.shape
        num_latents = self.config.num_latent_tokens
        past = max(cache[0].length - num_latents, 0) if cache else 0
        if token_mask is None and past:
            token_mask = input_ids.new_ones(batch, past + length, dtype=torch.bool)
        # "dynamic" frequencies must not change under keys that are already rotated: a cache takes those of its end.
        total = cache[0].capacity - num_latents if cache else past + length
        hidden = self.embed_tokens(input_ids)
        if token_mask is None:
            positions = torch.arange(length, device=input_ids.device).unsqueeze(0)
            rotary = self._rotary(positions, positions.new_full((1,), total), hidden.dtype, num_latents)
            mask = used = None
        else:
            # A row's positions count its real tokens only, so padding does not move them.
            positions = (token_mask.cumsum(1) - 1).clamp_min(0)
            padding = (~token_mask).sum(1)
            rotary = self._rotary(positions[:, past:], total - padding, hidden.dtype, 0 if past else num_latents)
            mask = attention_mask(token_mask, length, num_latents)
            used = token_mask[:, past:]
            used = None if bool(used.all()) else used
        for layer, block in enumerate(self.layers):
            inputs = (hidden, rotary, mask, used, cache[layer] if cache else None)
            recompute = layer < self.recompute_blocks and torch.is_grad_enabled()
            hidden = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return self.norm(hidden)

    def _rotary(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype, num_latents: int) -> Rotary:
        config = self.config
        frequencies, factor = rope_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings, lengths
        )
        return rotary_table(positions, frequencies, factor, dtype, config.rope_interleaved, num_latents)


def _generator(seed: int, *key: int) -> torch.Generator:
    """A generator for each (seed, *key), no two of which share a stream."""
    sequence = np.random.SeedSequence(seed, spawn_key=key)  # not (seed, *key): (0,) and (0, 0, 0) are one seed there
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
