"""A tiny model of each class of transformers in the table, with random weights and with values that are not the class's
defaults wherever it has any; and what runs in it: chosen experts, logits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megamoe.checkpoint.opening import open_source
from megamoe.formats.config_json import preset_of
from megamoe.formats.source import load_weights
from megamoe.model.decoder import Decoder

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_experts_per_tok": 3,
    "hidden_act": "gelu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 3e-3,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 300.0}
GROUPED = {"routed_scaling_factor": 1.7, "n_group": 4, "topk_group": 2, "norm_topk_prob": False}
DENSE = {"moe_intermediate_size": 20, "intermediate_size": 36, "first_k_dense_replace": 2, "n_shared_experts": 2}
# What each class has besides; `tie_word_embeddings` is true, its other value, in three of them.
CLASSES: dict[str, dict[str, Any]] = {
    "Mixtral": {
        "num_local_experts": 8,
        "head_dim": 12,
        "sliding_window": 5,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 400.0,
            "factor": 2.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 32,
        },
    },
    "Olmoe": {
        "num_experts": 8,
        "attention_bias": True,
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 200.0, "factor": 2.5},
    },
    "Qwen3Moe": {
        "num_experts": 8,
        "head_dim": 12,
        "moe_intermediate_size": 20,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "rope_parameters": {**YARN, "beta_fast": 1.2, "beta_slow": 0.2, "attention_factor": 1.3},
    },
    "MiniMaxM2": {
        "num_local_experts": 8,
        "head_dim": 12,
        "rotary_dim": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 250.0},
    },
    "Glm4Moe": {
        **GROUPED,
        **DENSE,
        "n_routed_experts": 8,
        "head_dim": 16,
        "attention_bias": True,
        "use_qk_norm": True,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
        "rope_parameters": YARN,
    },
    "DeepseekV3": {
        **GROUPED,
        **DENSE,
        "n_routed_experts": 8,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "kv_lora_rank": 12,
        "q_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "rope_interleave": False,
        "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
    },
}


def new_model(name: str) -> Any:
    """The class's model with random weights: matrices and biases N(0, 0.15), routers wider, so that few choices are
    close; norms around 1."""
    import transformers  # takes seconds, which the ranks of these tests need not spend

    config = getattr(transformers, f"{name}Config")(**COMMON | CLASSES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, one in model.named_parameters():
            std = 0.3 if parameter_name.endswith("mlp.gate.weight") else 0.15
            one.normal_(1.0 if "norm" in parameter_name else 0.0, std, generator=generator)
        for buffer_name, one in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                one.normal_(0, 0.2, generator=generator)
    return model


def edit_config(directory: Path, **changes: Any) -> None:
    """Give config.json other values."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_mtp(directory: Path) -> None:
    """Give a directory of one file a layer of multi-token prediction, under DeepSeek's names."""
    file = directory / "model.safetensors"
    held = load_file(file)
    width, dtype = held["model.norm.weight"].numel(), held["model.norm.weight"].dtype
    added = {name.replace("layers.2", "layers.3"): one.clone() for name, one in held.items() if "layers.2" in name}
    norms = ("enorm", "hnorm", "shared_head.norm")
    added |= {f"model.layers.3.{name}.weight": torch.rand(width, dtype=dtype) for name in norms}
    added["model.layers.3.eh_proj.weight"] = torch.rand(width, 2 * width, dtype=dtype)
    save_file(held | added, file, metadata={"format": "pt"})


def load(directory: Path, **options: Any) -> Any:
    """As transformers loads it, without code of the directory."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False, **options).eval()


def decoder_of(directory: Path) -> Decoder:
    """megamoe's model of a directory."""
    model = Decoder(preset_of(directory))
    load_weights(model, open_source(directory), torch.float32)
    return model.eval()


def batch() -> tuple[Tensor, Tensor]:
    """Token ids and mask, (3, 9), with padding on the left."""
    real = torch.arange(9) >= torch.tensor([[3], [1], [0]])
    return torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(0)), real


class Run(NamedTuple):
    """What a model makes of the real tokens of a batch, of which there are N."""

    logits: Tensor  # (N, V)
    experts: list[Tensor]  # of each sparse block, (N, K), sorted


@torch.no_grad()
def run_theirs(model: Any, ids: Tensor, real: Tensor) -> Run:
    """Args: real: (B, T) bool, False at padding."""
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    call = lambda: model(ids, attention_mask=real.long()).logits  # noqa: E731
    found = _run(call, gates, lambda output: output[2])
    return Run(found.logits[real], [one[real.flatten()] for one in found.experts])


@torch.no_grad()
def run_ours(model: Any, ids: Tensor, real: Tensor) -> Run:
    """The same of a Decoder; its routers see real tokens only."""
    call = lambda: model(ids, attention_mask=real)  # noqa: E731
    found = _run(call, model.routers(), lambda routing: routing.expert_ids)
    return Run(found.logits[real], found.experts)


def _run(call: Callable[[], Tensor], routers: Any, experts_of: Callable[[Any], Tensor]) -> Run:
    experts: list[Tensor] = []

    def keep_experts(_module: nn.Module, _inputs: Any, output: Any) -> None:
        experts.append(experts_of(output).sort(-1).values)

    hooks = [router.register_forward_hook(keep_experts) for router in routers]
    try:
        return Run(call(), experts)
    finally:
        for hook in hooks:
            hook.remove()


def distance(run: Run, other: Run) -> float:
    """Largest difference of logits, relative to the largest value; infinite where other experts are chosen."""
    if any(not torch.equal(one, two) for one, two in zip(run.experts, other.experts, strict=True)):
        return math.inf
    return ((run.logits - other.logits).abs().max() / other.logits.abs().max()).item()
