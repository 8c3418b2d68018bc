"""A megamoe decoder for transformers: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).

Attention, rotary embeddings, router and the sections of the configuration that they take are megamoe's own files,
exported next to this one; the experts run one after another on one device, without DeepSpeed.

Shape legend: B batch, T positions of this call, S positions so far, D hidden_size, K experts per token, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention import GroupedQueryAttention, attention_mask
from .configuration_megamoe import MegaMoeConfig
from .rope import Rotary, rope_frequencies, rotary_table
from .router import Router
from .sections import AttentionSection, RouterSection, section

# The name under which this release of transformers hands a cache around.
CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class _TokenCache:
    """A layer's share of a transformers cache, which holds tokens only; the latents are put before them each time."""

    def __init__(self, cache: Cache, layer: int, attention: GroupedQueryAttention, length: int):
        """
        Args:
            length: tokens held; with the first ones the latents come too.
        """
        self.cache = cache
        self.layer = layer
        self.attention = attention
        self.length = length

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.attention
        if attention.latents is None:
            return self.cache.update(key, value, self.layer)
        if self.length == 0:
            num_latents = attention.latents.shape[0]
            key, value = key[:, :, num_latents:], value[:, :, num_latents:]
        key, value = self.cache.update(key, value, self.layer)
        return self._with_latents(key, attention.k_proj), self._with_latents(value, attention.v_proj)

    def _with_latents(self, x: Tensor, projection: nn.Module) -> Tensor:
        heads = projection(self.attention.latents).unflatten(-1, (-1, x.shape[-1])).transpose(0, 1)  # (G, M, d)
        return torch.cat((heads.expand(x.shape[0], -1, -1, -1), x), dim=2)


class MegaMoeExpert(nn.Module):
    """Two projections with an activation between, gated or not, dropout on the output."""

    def __init__(self, config: MegaMoeConfig):
        super().__init__()
        outside, inside = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(outside, inside, bias=False) if config.gated_mlp else None
        self.up_proj = nn.Linear(outside, inside, bias=False)
        self.down_proj = nn.Linear(inside, outside, bias=False)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.expert_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) -> (rows, D)."""
        up = self.up_proj(x)
        inside = self.activation(self.gate_proj(x)) * up if self.gate_proj else self.activation(up)
        return self.dropout(self.down_proj(inside))


class MegaMoeExperts(nn.Module):
    """The router's K experts for every token, weighted."""

    def __init__(self, config: MegaMoeConfig):
        super().__init__()
        self.router = Router(**section(RouterSection, config))
        self.experts = nn.ModuleList(MegaMoeExpert(config) for _ in range(config.num_local_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        rows = hidden_states.flatten(0, 1)
        weights, expert_ids, _ = self.router(rows)  # (B * T, K) each
        results = rows.new_zeros(*expert_ids.shape, rows.shape[1])
        for expert_id, expert in enumerate(self.experts):
            token, choice = (expert_ids == expert_id).nonzero(as_tuple=True)
            if len(token):
                results = results.index_put((token, choice), expert(rows[token]))
        return (results * weights.unsqueeze(-1).to(rows.dtype)).sum(1).view_as(hidden_states)


class MegaMoeBlock(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: MegaMoeConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = GroupedQueryAttention(**section(AttentionSection, config))
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.moe = MegaMoeExperts(config)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: _TokenCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.moe(self.post_attention_layernorm(x))


class MegaMoePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every megamoe model."""

    config_class = MegaMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["MegaMoeBlock"]  # noqa: RUF012 - transformers' own form
    _keep_in_fp32_modules_strict = {"router"}  # noqa: RUF012 - in bf16 its bias would send tokens to other experts

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, GroupedQueryAttention) and module.latents is not None:
            nn.init.normal_(module.latents, std=self.config.initializer_range)
        elif isinstance(module, Router):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.selection_bias)
            nn.init.constant_(module.running_load, 1.0 / self.config.num_local_experts)
            nn.init.zeros_(module.step_counts)


class MegaMoeModel(MegaMoePreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: MegaMoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MegaMoeBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) behind the last norm.

        Args:
            attention_mask: (B, S), 0 at padding, left or right. Positions are counted over the tokens that are not
                padding, whatever `position_ids` say.
            cache: what newer releases of transformers call past_key_values.
        """
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        mask, rotary = self._mask_and_rotary(hidden, attention_mask, past)
        for number, layer in enumerate(self.layers):
            layer_cache = None if cache is None else _TokenCache(cache, number, layer.self_attn, past)
            hidden = layer(hidden, rotary, mask, layer_cache)
        kept: dict[str, Any] = {CACHE_FIELD: cache}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **kept)

    def _mask_and_rotary(self, hidden: Tensor, token_mask: Tensor | None, past: int) -> tuple[Tensor | None, Rotary]:
        batch, length, _ = hidden.shape
        if token_mask is None:
            token_mask = hidden.new_ones(batch, past + length)
        tokens = token_mask.bool()
        positions = (tokens.cumsum(1) - 1).clamp_min(0)
        config, rope = self.config, self.config.rope_parameters
        scaling = None if rope["rope_type"] == "default" else rope
        frequencies, factor = rope_frequencies(
            config.head_dim, rope["rope_theta"], scaling, config.max_position_embeddings, tokens.sum(1)
        )
        unrotated = 0 if past else config.num_latent_tokens
        rotary = rotary_table(
            positions[:, past:], frequencies, factor, hidden.dtype, config.rope_interleaved, unrotated
        )
        # Without a mask the attention is plainly causal over as many queries as keys.
        mask = attention_mask(tokens, length, config.num_latent_tokens) if past or not bool(tokens.all()) else None
        return mask, rotary


class MegaMoeForCausalLM(MegaMoePreTrainedModel, GenerationMixin):
    """The decoder with its tied head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' own form

    def __init__(self, config: MegaMoeConfig):
        super().__init__(config)
        self.model = MegaMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T or logits_to_keep, V); with `labels` (B, T) also their loss, shifted by one."""
        outputs = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, cache)
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, rows])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_FIELD: getattr(outputs, CACHE_FIELD)})
