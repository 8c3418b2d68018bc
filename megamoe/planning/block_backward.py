"""The backward pass of a block, walked through in the order of autograd: last operation first.

Kinds of bytes are those of `footprint.py`.
"""

from __future__ import annotations

from megamoe.model.names import engine_name
from megamoe.planning.activations import BlockBytes, MLPBytes
from megamoe.planning.buckets import Ledger, Reduction
from megamoe.planning.expert_layer import ACTIVATIONS, GRADIENTS, TEMPORARIES, activation_backward, experts_backward
from megamoe.planning.sharding import Setup


def block_backward(setup: Setup, block: BlockBytes, ledger: Ledger, reduction: Reduction, prefix: str) -> None:
    """From the gradient of a block's output to that of its input.

    Args:
        prefix: of its parameters' plain names.
    """

    def ready(name: str) -> None:
        reduction.ready(engine_name(prefix + name))

    if block.mlp:
        _mlp_backward(setup, block, block.mlp, ledger, reduction, prefix)
    if block.experts:
        experts_backward(setup, block.experts, ledger, reduction, engine_name(prefix))
        ledger.transient(TEMPORARIES, block.router_backward)
        ledger.free(ACTIVATIONS, block.router)
        ready("moe.router.weight")
        if block.mlp:
            ledger.free(GRADIENTS, block.stream)  # the shared experts', added
    ready("post_attention_layernorm.weight")
    norm_backward(block, ledger)
    _attention_backward(setup, block, ledger, reduction, prefix)
    ready("input_layernorm.weight")
    norm_backward(block, ledger)


def norm_backward(block: BlockBytes, ledger: Ledger) -> None:
    """Of one RMSNorm."""
    # The product that the weight's gradient needs is freed first.
    ledger.free(ACTIVATIONS, block.norm // 2)
    ledger.transient(TEMPORARIES, block.norm_backward)
    ledger.free(ACTIVATIONS, block.norm - block.norm // 2)


def _mlp_backward(
    setup: Setup, block: BlockBytes, mlp: MLPBytes, ledger: Ledger, reduction: Reduction, prefix: str
) -> None:
    """Of the dense MLP, or of the shared experts, whose gradient of the input waits for the experts'."""
    m, name = setup.model, "shared_mlp" if block.experts else "mlp"

    def ready(projection: str) -> None:
        reduction.ready(engine_name(f"{prefix}{name}.{projection}.weight"))

    if mlp.gate:
        ledger.transient(TEMPORARIES, 2 * block.stream)
        ledger.free(ACTIVATIONS, mlp.gate)
        reduction.ready(engine_name(f"{prefix}shared_gate.weight"))
    is_relu = m.hidden_act == "relu" and not m.gated_mlp
    ledger.allocate(GRADIENTS, mlp.inside)
    ready("down_proj")
    ledger.free(ACTIVATIONS, 0 if is_relu else mlp.inside)
    if m.gated_mlp:
        ledger.allocate(GRADIENTS, mlp.inside)  # of both factors
        ledger.transient(TEMPORARIES, mlp.inside)
        ledger.free(ACTIVATIONS, mlp.hidden - mlp.inside)
        ready("gate_proj")
        ledger.transient(GRADIENTS, 2 * block.stream)
        ledger.free(GRADIENTS, mlp.inside)
    else:
        activation_backward(m, mlp.inside, ledger, mlp.inside if is_relu else mlp.hidden - mlp.inside)
    ready("up_proj")
    ledger.allocate(GRADIENTS, block.stream)
    ledger.free(GRADIENTS, mlp.inside)
    ledger.free(ACTIVATIONS, block.mlp_input)
    if not block.experts:
        ledger.free(GRADIENTS, block.stream)


def _attention_backward(setup: Setup, block: BlockBytes, ledger: Ledger, reduction: Reduction, prefix: str) -> None:
    m = setup.model

    def ready(*names: str) -> None:
        for name in names:
            reduction.ready(engine_name(f"{prefix}self_attn.{name}"))

    ready(*(["o_proj.bias"] if m.attention_out_bias else []), "o_proj.weight")
    ledger.transient(TEMPORARIES, block.attention_backward)
    ledger.free(ACTIVATIONS, block.attention)
    if m.kv_lora_rank:
        ready("kv_b_proj.weight", "kv_a_layernorm.weight", *_linear("kv_a_proj_with_mqa", m.attention_bias))
        if m.q_lora_rank:
            ready("q_b_proj.weight", "q_a_layernorm.weight", *_linear("q_a_proj", m.attention_bias))
        else:
            ready("q_proj.weight")
        return
    if m.num_latent_tokens:
        ready("latents")
    ready(*_linear("v_proj", m.attention_bias))
    for projection in ("k", "q"):
        ready(*([f"{projection}_norm.weight"] if m.qk_norm else []))
        ready(*_linear(f"{projection}_proj", m.attention_bias))


def _linear(name: str, has_bias: bool) -> list[str]:
    return [f"{name}.bias", f"{name}.weight"] if has_bias else [f"{name}.weight"]
