"""A decoder block: attention, then experts or one dense MLP, each behind a norm and added to the residual stream.

Shape legend: B batch, S positions, D hidden_size.
"""

from __future__ import annotations

from torch import Tensor, nn

from megamoe.config.model import ModelConfig
from megamoe.model.attention import LayerCache
from megamoe.model.compiled import CompiledBlock
from megamoe.model.document_attention import Mask, attend
from megamoe.model.experts import StackedExperts
from megamoe.model.feed_forward import MLP
from megamoe.model.from_config import build_attention, from_config
from megamoe.model.moe import MoE
from megamoe.model.rope import Rotary
from megamoe.model.router import Router
from megamoe.model.router_losses import RouterLosses
from megamoe.model.topology import ExpertTopology


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), or x + experts(norm(x)) and what the shared experts add."""

    def __init__(self, config: ModelConfig, topology: ExpertTopology, is_dense: bool):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = build_attention(config, config.rope_scaling)
        self.self_attn.attend = attend  # type: ignore[assignment]
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.compiled: CompiledBlock | None = None  # what training runs instead, see `Decoder.compile_blocks`
        self.is_dense = is_dense
        if is_dense:
            self.mlp = from_config(MLP, config)
            return
        self.moe = MoE(
            router=from_config(Router, config, losses=build_router_losses(config)),
            experts=from_config(StackedExperts, config, num_experts=topology.experts_per_rank),
            topology=topology,
            hidden_size=config.hidden_size,
        )
        # Not inside of `moe`, and without "expert" in their names: DeepSpeed takes such parameters for the experts'.
        self.shared_mlp = self.shared_gate = None
        if config.n_shared_experts:
            self.shared_mlp = from_config(MLP, config, intermediate_size=config.shared_size)
        if config.shared_expert_gate:
            self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Mask, used: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) -> (B, S, D) and the router's losses (2,), where it has any.

        Args:
            mask: see `GroupedQueryAttention`.
            used: (U,) int64, which of the B * S positions are not padding, which no expert gets; None where all are.
        """
        if self.compiled and self.training and cache is None:
            return self.compiled(self, x, rotary, mask, used)
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        rows = self.post_attention_layernorm(x)
        if self.is_dense:
            return x + self.mlp(rows), None
        out, losses, _ = self.moe(rows, used, lambda: self.with_shared(x, rows))
        return out, losses

    def with_shared(self, x: Tensor, rows: Tensor) -> Tensor:
        """x (B, S, D) and what the shared experts make of `rows` (B, S, D), if there are any."""
        if self.shared_mlp is None:
            return x
        shared = self.shared_mlp(rows)
        return x + (shared if self.shared_gate is None else self.shared_gate(rows).sigmoid() * shared)


def build_router_losses(config: ModelConfig) -> RouterLosses | None:
    """The losses of a router; None where none has a coefficient."""
    balance = config.router_aux_loss_type if config.router_aux_loss_coef else None
    z = config.router_z_loss_coef > 0
    return RouterLosses(balance, z) if balance or z else None
