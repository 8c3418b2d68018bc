"""A megamoe decoder for transformers: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).

Attention, rotary embeddings, router and how they are made of a configuration are megamoe's own files,
exported next to this one. Masks, caches, attention kernels, checkpointing and recorded outputs are transformers'. The
experts run one after another on one device, without DeepSpeed.

Shape legend: B batch, T positions of this call, S positions so far, M latent tokens, D hidden_size, E experts,
K experts per token, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

# Transformers before 5.12 copies no more of our files than this one imports itself: those marked are not used here.
from .attention import GroupedQueryAttention
from .attention_function import AttentionFunction, AttentionWeights, TokenCache
from .configuration_megamoe import MegaMoeConfig
from .feed_forward import MLP
from .from_config import build_attention, from_config
from .latent_attention import MultiHeadLatentAttention  # noqa: F401
from .margins import BINS  # noqa: F401
from .rope import Rotary, rope_frequencies, rotary_table
from .router import Router
from .router_losses import RouterLosses  # noqa: F401

# The name under which this release of transformers hands a cache around.
CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class RouterLogits(nn.Identity):
    """Where transformers records the logits (B * T, E)."""


class MegaMoeExperts(nn.Module):
    """The router's K experts for every token, weighted."""

    def __init__(self, config: MegaMoeConfig):
        super().__init__()
        self.router = from_config(Router, config, losses=None, counts_margins=False)
        self.logits = RouterLogits()
        self.experts = nn.ModuleList(
            from_config(MLP, config, intermediate_size=config.expert_size) for _ in range(config.num_local_experts)
        )
        self.dropout = nn.Dropout(config.expert_dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        rows = hidden_states.flatten(0, 1)
        with torch.autocast(rows.device.type, enabled=False):  # logits in bf16 would choose other experts
            routing = self.router.route(self.logits(self.router.logits(rows)))
        weights, expert_ids = routing.weights, routing.expert_ids  # (B * T, K) each
        order = expert_ids.flatten().argsort()  # of the choices, by expert
        parts = rows.index_select(0, order // expert_ids.shape[1]).split(routing.counts.tolist())
        # In training an expert without tokens has a gradient too, of zeros.
        found = [expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part) or self.training]
        results = self.dropout(torch.cat(found))
        results = torch.empty_like(results).index_copy(0, order, results).view(*expert_ids.shape, -1)
        return (results * weights.unsqueeze(-1).to(results.dtype)).sum(1).to(rows.dtype).view_as(hidden_states)


class MegaMoeBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + MLP(norm(x)), or x + experts(norm(x)) and what the shared experts add."""

    def __init__(self, config: MegaMoeConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.num_latents = config.num_latent_tokens
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = build_attention(config, _rope_scaling(config))
        self.self_attn.attend = AttentionFunction(config)  # the one that transformers names
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.is_dense = config.is_dense(layer)
        if self.is_dense:
            self.mlp = from_config(MLP, config)
            return
        self.moe = MegaMoeExperts(config)
        self.shared_mlp = self.shared_gate = None
        if config.n_shared_experts:
            size = config.n_shared_experts * config.expert_size
            self.shared_mlp = from_config(MLP, config, intermediate_size=size)
        if config.shared_expert_gate:
            self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: Cache | None = None) -> Tensor:
        token_cache = None if cache is None else TokenCache(cache, self.layer, self.num_latents)
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, token_cache)
        rows = self.post_attention_layernorm(x)
        if self.is_dense:
            return x + self.mlp(rows)
        if self.shared_mlp:
            shared = self.shared_mlp(rows)
            x = x + (self.shared_gate(rows).sigmoid() * shared if self.shared_gate else shared)
        return x + self.moe(rows)


def _rope_scaling(config: MegaMoeConfig) -> dict[str, Any] | None:
    """As in the preset; the attribute of that name is transformers' own."""
    return None if config.rope_parameters["rope_type"] == "default" else config.rope_parameters


class MegaMoePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every megamoe model."""

    config: MegaMoeConfig
    config_class = MegaMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["MegaMoeBlock"]  # noqa: RUF012 - transformers' own form
    _keep_in_fp32_modules_strict = {"router"}  # noqa: RUF012 - in bf16 its bias would send tokens to other experts
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)mtp\."]  # noqa: RUF012 - multi-token prediction only trains
    _can_record_outputs = {  # noqa: RUF012 - transformers' own form
        "hidden_states": MegaMoeBlock,
        "attentions": OutputRecorder(AttentionWeights),
        "router_logits": OutputRecorder(RouterLogits),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GroupedQueryAttention) and module.latents is not None:
            init.normal_(module.latents, std=self.config.initializer_range)
        elif isinstance(module, Router):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.selection_bias is not None:
                init.zeros_(module.selection_bias)
            init.constant_(module.running_load, 1.0 / self.config.num_local_experts)
            init.zeros_(module.step_counts)


class MegaMoeModel(MegaMoePreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: MegaMoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MegaMoeBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states (B, T, D) behind the last norm.

        Args:
            attention_mask: (B, S), 0 at padding, left or right; or what transformers' mask functions make of it, one
                for each of the layer types where there are several.
            position_ids: (B or 1, T); without them the tokens that are not padding are counted.
            cache: what newer releases of transformers call past_key_values.

        Raises ValueError unless there is exactly one of `input_ids` (B, T) and `inputs_embeds` (B, T, D).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = _positions(attention_mask, past, hidden.shape[1], hidden.device)
        masks = self._masks(hidden, attention_mask, position_ids, cache)
        rotary = self._rotary(hidden, position_ids)
        for kind, layer in zip(self.config.layer_types, self.layers, strict=True):
            hidden = layer(hidden, rotary, masks[kind], cache=cache)
        kept: dict[str, Any] = {CACHE: cache}
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden), **kept)

    def _masks(
        self, hidden: Tensor, attention_mask: Any, position_ids: Tensor, cache: Cache | None
    ) -> dict[str, Tensor | None]:
        """By layer type, in the form of `attn_implementation`, with the latents visible to all."""
        masks = attention_mask
        if not isinstance(masks, dict):
            arguments = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: cache}
            kinds = set(self.config.layer_types)
            masks = {kind: MASKS[kind](config=self.config, inputs_embeds=hidden, **arguments) for kind in kinds}
        return {kind: _with_latents(mask, self.config.num_latent_tokens, hidden) for kind, mask in masks.items()}

    def _rotary(self, hidden: Tensor, position_ids: Tensor) -> Rotary:
        config, device = self.config, hidden.device.type
        frequencies, factor = rope_frequencies(
            config.rotary_dim,
            config.rope_parameters["rope_theta"],
            _rope_scaling(config),
            config.max_position_embeddings,
            lengths=position_ids.amax(1) + 1,
        )
        # The dtype of queries and keys, so that the rotation leaves it as it is.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        return rotary_table(position_ids, frequencies, factor, dtype, config.rope_interleaved, config.num_latent_tokens)


def _positions(attention_mask: Any, past: int, length: int, device: torch.device) -> Tensor:
    """Positions (B or 1, T) of the tokens after `past` others, by a mask (B, S) if there is one."""
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        counted = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
        return counted[:, past : past + length].to(device)
    return (torch.arange(length, device=device) + past).unsqueeze(0)


def _with_latents(mask: Tensor | None, num_latents: int, hidden: Tensor) -> Tensor | None:
    """A mask (B, 1, T, S) over latents too, (B, 1, T, M + S). None stands for one that is causal or hides nothing."""
    if not num_latents:
        return mask
    if mask is None:
        # A lone query sees all. Said aloud, for without a mask attention sends the latents' queries too.
        return hidden.new_ones(1, 1, 1, 1, dtype=torch.bool) if hidden.shape[1] == 1 else None
    return F.pad(mask, (num_latents, 0), value=mask.dtype == torch.bool)


class MegaMoeForCausalLM(MegaMoePreTrainedModel, GenerationMixin):
    """The decoder with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' own form

    def __init__(self, config: MegaMoeConfig):
        super().__init__(config)
        self.model = MegaMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits (B, T or logits_to_keep, V); with `labels` (B, T) also their cross-entropy, shifted by one, to which
        no auxiliary loss is added."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, rows])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        kept: dict[str, Any] = {CACHE: getattr(outputs, CACHE)}
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **kept,
        )
