"""The decoder: embedding, blocks, head, and the loss that it trains on.

Shape legend: B batch, T positions of this call, S positions so far (cached and new), D hidden_size, V vocab_size.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.config.model import ModelConfig
from megamoe.config.run import Recompute
from megamoe.data.document_bounds import Documents
from megamoe.data.source import NO_LABEL
from megamoe.model.attention import LayerCache, attention_mask
from megamoe.model.block import Block
from megamoe.model.compiled import CompiledBlock
from megamoe.model.document_attention import DocumentMask, Mask, takes_lengths
from megamoe.model.loss import OfLogits, TokenScores, chunked_head_loss, chunked_token_scores, losses_of_logits
from megamoe.model.moe import MoE
from megamoe.model.multi_token import MultiTokenPredictor
from megamoe.model.names import expert_id, is_norm, is_residual_projection, layer_id, plain_parts
from megamoe.model.recompute import run_recomputed
from megamoe.model.rope import Rotary, rope_frequencies, rotary_table
from megamoe.model.router import Router
from megamoe.model.topology import ExpertTopology


class Stream(NamedTuple):
    """What the blocks have made of the tokens."""

    hidden: Tensor  # (B, T, D)
    router_losses: list[Tensor]  # (2,) of each router that has any
    rotary: Rotary
    mask: Mask  # of the last block
    used: Tensor | None  # (U,) int64, as the blocks took it


class Decoder(nn.Module):
    """The language model; of every layer's experts it holds those of its topology.

    Buffers:
        step_losses: (P + S, 2), of each part of the loss, the sum over the micro-batches since the last optimizer step
            on this rank, and the sum of the shares of their positions that it is of; then of each source of samples the
            sum of its tokens' cross-entropy, and their number; not saved.
    """

    step_losses: Tensor

    def __init__(
        self,
        config: ModelConfig,
        seed: int | None = 0,
        topology: ExpertTopology | None = None,
        recompute_blocks: int = 0,
        recompute: Recompute = "whole",
        num_sources: int = 0,
    ):
        """
        Args:
            seed: of the initial weights, which do not depend on the topology; None draws none, for a model whose
                weights are loaded.
            topology: of this rank; None holds all experts.
            recompute_blocks: number of blocks, from the first on, that backward recomputes.
            recompute: what of them: all, or the operators whose results cost little, see `recompute.py`.
            num_sources: S, of samples whose losses are kept apart in training.
        """
        super().__init__()
        self.config = config
        self.topology = topology or ExpertTopology(config.num_local_experts)
        self.recompute_blocks = recompute_blocks
        self.recompute: Recompute = recompute
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, self.topology, config.is_dense(block)) for block in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head: nn.Linear | None = None  # without one, the embedding is the head
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MultiTokenPredictor(config, self.topology) if config.num_nextn_predict_layers else None
        self.loss_parts = loss_parts(config)
        self.of_logits: OfLogits = losses_of_logits  # what training computes losses by, see `compile_blocks`
        self.register_buffer("step_losses", torch.zeros(len(self.loss_parts) + num_sources, 2), persistent=False)
        if seed is not None:
            self._init_weights(seed)

    @torch.no_grad()
    def _init_weights(self, seed: int) -> None:
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)

        shared = seeded_generator(seed)
        own: dict[tuple[int, int], torch.Generator] = {}  # an expert's, for its projections one after the other
        for name, parameter in self.named_parameters():
            for part in plain_parts(name, parameter.shape, self.topology.first_expert):
                weight = parameter.flatten()[part.start : part.start + part.count].view(part.shape)
                layer, expert = layer_id(part.name), expert_id(part.name)
                if expert is None:
                    generator = shared
                else:
                    key = (self.config.num_hidden_layers if layer is None else layer, expert)
                    generator = own[key] = own.get(key) or seeded_generator(seed, *key)
                if part.name.endswith(".bias"):
                    weight.zero_()
                elif not is_norm(part.name):
                    weight.normal_(0, residual_std if is_residual_projection(part.name) else std, generator=generator)

    def compile_blocks(self) -> None:
        """Let all blocks train as one `CompiledBlock`, and compile the losses; both when the first batch comes."""
        compiled = CompiledBlock()
        for block in self.blocks():
            block.compiled = compiled
        # For each number of rows, of which a run has few: with an unknown one, C++ copies all logits once more.
        self.of_logits = torch.compile(losses_of_logits, fullgraph=True, dynamic=False)

    def blocks(self) -> list[Block]:
        """All blocks, first block first; that of multi-token prediction comes last."""
        blocks = [*self.layers, *([self.mtp.block] if self.mtp else [])]
        return [cast(Block, block) for block in blocks]

    def moe_layers(self) -> list[MoE]:
        """The expert layers, those of `config.sparse_blocks`."""
        return [block.moe for block in self.blocks() if not block.is_dense]

    def routers(self) -> list[Router]:
        """The routers, those of `config.sparse_blocks`."""
        return [moe.router for moe in self.moe_layers()]

    def take_entropies(self) -> Tensor:
        """(L,): of each router the `sum_of_entropies` of this rank's tokens since the last call."""
        held = [moe.deepspeed_moe.step_entropy for moe in self.moe_layers()]
        entropies = torch.stack(held)
        torch._foreach_zero_(held)
        return entropies

    @property
    def head(self) -> Tensor:
        """Weight of the head, (V, D)."""
        return (self.lm_head or self.embed_tokens).weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: list[LayerCache] | None = None,
        documents: Documents | None = None,
        sources: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or with `labels` the loss.

        In evaluation the loss is the mean cross-entropy in nats over the labels that count (0 if there are none), in
        fp32. In training the sum is divided by B * T, so that no split of a step's samples changes the gradients, the
        other parts of the loss are added, times their coefficients, and all parts are added to the buffer
        `step_losses`, in the order of `loss_parts` and without coefficients.

        Args:
            input_ids: (B, T) token ids.
            labels: (B, T), the id that follows each position; -100 where none counts. Training with multi-token
                prediction needs (B, T + 1): those that follow the ids, and the one after.
            attention_mask: (B, S) bool, False at padding, left or right; None means no padding.
            cache: from `new_cache`; the call's tokens are appended to it.
            documents: of the rows, within which attention stays; not with `attention_mask` or `cache`.
            sources: (B,) int64, the source of each row; training adds its cross-entropy to that one's `step_losses`.
        """
        stream = self._stream(input_ids, attention_mask, cache, documents)
        hidden = self.norm(stream.hidden)
        if labels is None:
            return F.linear(hidden, self.head)
        length = input_ids.shape[1]
        needed = length + (self.config.num_nextn_predict_layers if self.training else 0)
        if labels.shape[1] != needed:
            why = ", one further for multi-token prediction" if needed > length else ""
            raise ValueError(f"labels are {labels.shape[1]} per row for {length} ids; give {needed}{why}.")
        if self.training:
            return self._training_loss(stream, hidden, labels, documents, sources)
        total = chunked_head_loss(hidden.flatten(0, 1), self.head, labels.flatten()).total
        return total / _share(labels).clamp_min(1e-9)

    @torch.no_grad()
    def score(self, input_ids: Tensor, labels: Tensor, documents: Documents | None = None) -> TokenScores:
        """How the model takes each label, (B, T) each, to be called in evaluation mode. Arguments as of `forward`."""
        hidden = self.norm(self._stream(input_ids, None, None, documents).hidden)
        scores = chunked_token_scores(hidden.flatten(0, 1), self.head, labels.flatten())
        return TokenScores(*(part.view_as(labels) for part in scores))

    def new_cache(self, capacity: int) -> list[LayerCache]:
        """An empty key/value cache for sequences of up to `capacity` tokens."""
        return [LayerCache(self.config.num_latent_tokens + capacity) for _ in self.layers]

    def _stream(
        self,
        input_ids: Tensor,
        token_mask: Tensor | None,
        cache: list[LayerCache] | None,
        documents: Documents | None,
    ) -> Stream:
        batch, length = input_ids.shape
        num_latents = self.config.num_latent_tokens
        past = max(cache[0].length - num_latents, 0) if cache else 0
        if token_mask is None and past:
            token_mask = input_ids.new_ones(batch, past + length, dtype=torch.bool)
        # "dynamic" frequencies must not change under keys that are already rotated: a cache takes those of its end.
        total = cache[0].capacity - num_latents if cache else past + length
        hidden = self.embed_tokens(input_ids)
        used = None
        if documents:
            lengths = documents.starts.diff().long()
            lengths = lengths.repeat_interleave(lengths, output_size=batch * length).view(batch, length)
            rotary = self._rotary(documents.positions, lengths, hidden.dtype, num_latents)
            used = documents.tokens
        elif token_mask is None:
            positions = torch.arange(length, device=input_ids.device).unsqueeze(0)
            rotary = self._rotary(positions, positions.new_full((1,), total), hidden.dtype, num_latents)
        else:
            # A row's positions count its real tokens only, so padding does not move them.
            positions = (token_mask.cumsum(1) - 1).clamp_min(0)
            padding = (~token_mask).sum(1)
            rotary = self._rotary(positions[:, past:], total - padding, hidden.dtype, 0 if past else num_latents)
            used = token_mask[:, past:].flatten().nonzero().squeeze(1)
            used = None if len(used) == batch * length else used
        masks = self._masks(token_mask, documents, hidden)
        losses: list[Tensor] = []
        for layer, block in enumerate(self.layers):
            mask = masks[self.config.window(layer)]
            inputs = (hidden, rotary, mask, used, cache[layer] if cache else None)
            recompute = layer < self.recompute_blocks and torch.is_grad_enabled()
            hidden, of_router = run_recomputed(block, self.recompute, *inputs) if recompute else block(*inputs)
            losses += [of_router] if of_router is not None else []
        return Stream(hidden, losses, rotary, masks[self.config.window(-1)], used)

    def _masks(self, token_mask: Tensor | None, documents: Documents | None, hidden: Tensor) -> dict[int | None, Mask]:
        """What the queries of `hidden` (B, T, D) see, by the window of a layer; None where that is plainly causal."""
        config, (batch, length, _) = self.config, hidden.shape
        latents, masks = config.num_latent_tokens, dict[int | None, Mask]()
        is_one_call = takes_lengths(hidden, max(config.head_dim, config.value_dim))
        for window in {config.window(block) for block in range(config.num_hidden_layers)}:
            if token_mask is not None:
                masks[window] = attention_mask(token_mask, length, latents, window)
            elif documents:
                masks[window] = DocumentMask.of(documents, is_one_call, latents, window)
            elif window is None or window >= length:
                masks[window] = None
            elif is_one_call:
                masks[window] = DocumentMask.of_rows(batch, length, hidden.device, window)
            else:
                masks[window] = attention_mask(hidden.new_ones(1, length, dtype=torch.bool), length, 0, window)
        return masks

    def _training_loss(
        self, stream: Stream, hidden: Tensor, labels: Tensor, documents: Documents | None, sources: Tensor | None
    ) -> Tensor:
        """The scalar to train on; adds its parts to `step_losses`.

        Args:
            hidden: (B, T, D), of the stream, normed.
            labels: as for `forward`, and `documents` and `sources`.
        """
        config, (batch, length, _) = self.config, hidden.shape
        following, router_losses = labels[:, :length], stream.router_losses
        of_logits = self.of_logits if sources is None else partial(self.of_logits, by_row=True)
        of_head = chunked_head_loss(
            hidden.flatten(0, 1), self.head, following.flatten(), config.output_z_loss_coef, of_logits
        )
        total, share = of_head.total, _share(following)
        parts = {"cross_entropy": (of_head.cross_entropy, share), "output_z": (of_head.z_loss, share)}
        if self.mtp:
            embedded = self.embed_tokens(following.masked_fill(following == NO_LABEL, 0))
            further, of_router = self.mtp(hidden, embedded, stream.rotary, stream.mask, stream.used)
            beyond = labels[:, 1:].masked_fill(following == NO_LABEL, NO_LABEL)
            if documents:  # what a document begins with says nothing of the next token of the one before
                begins_next = F.pad(documents.positions[:, 1:] == 0, (0, 1))
                beyond = beyond.masked_fill(begins_next, NO_LABEL)
            rows = further.flatten(0, 1)
            of_mtp = chunked_head_loss(rows, self.head, beyond.flatten(), of_logits=self.of_logits).total
            parts["mtp"] = of_mtp, _share(beyond)
            total = total + config.mtp_loss_coef * of_mtp
            router_losses = [*router_losses, *([of_router] if of_router is not None else [])]
        if router_losses:
            of_layers = torch.stack(router_losses)  # (L, 2)
            balance, z = of_layers.sum(0).unbind()
            total = total + config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
            share = share.new_full((), 1 if stream.used is None else len(stream.used) / (batch * length))
            parts["balance"], parts["router_z"] = (balance / len(of_layers), share), (z / len(of_layers), share)
        of_parts, of_sources = self.step_losses.tensor_split([len(self.loss_parts)])
        of_parts += torch.stack([torch.stack(parts[name]).detach() for name in self.loss_parts])
        if sources is not None and of_head.nats is not None:
            of_rows = torch.stack((of_head.nats.view_as(following).sum(1), (following != NO_LABEL).sum(1)), 1)
            of_sources.index_add_(0, sources, of_rows.to(of_sources.dtype))
        return total

    def _rotary(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype, num_latents: int) -> Rotary:
        config = self.config
        frequencies, factor = rope_frequencies(
            config.rotary_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings, lengths
        )
        return rotary_table(positions, frequencies, factor, dtype, config.rope_interleaved, num_latents)


def seeded_generator(seed: int, *key: int) -> torch.Generator:
    """A generator for each (seed, *key), no two of which share a stream."""
    sequence = np.random.SeedSequence(seed, spawn_key=key)  # not (seed, *key): (0,) and (0, 0, 0) are one seed there
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def _share(labels: Tensor) -> Tensor:
    """Of the labels, that count. Divided by a tensor, for a GPU rounds what it divides by a number."""
    return (labels != NO_LABEL).sum() / labels.new_full((), labels.numel())


def loss_parts(config: ModelConfig) -> tuple[str, ...]:
    """Names of what a model's training loss is made of."""
    parts = {
        "cross_entropy": True,
        "mtp": config.num_nextn_predict_layers > 0,
        "balance": config.router_aux_loss_coef > 0,
        "router_z": config.router_z_loss_coef > 0,
        "output_z": config.output_z_loss_coef > 0,
    }
    return tuple(name for name, is_there in parts.items() if is_there)
