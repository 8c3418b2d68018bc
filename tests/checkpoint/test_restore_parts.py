"""Models of parts that the toy model lacks: saved by two ranks that share each layer's experts, resumed by others."""

import pytest
from engines import make, save, train
from ranks import run_ranks

from megamoe.checkpoint.restore import restore_first_verified
from megamoe.config import ModelConfig

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "max_position_embeddings": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "gated_mlp": True,
    "tie_word_embeddings": False,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "router_score": "sigmoid",
    "router_aux_loss_coef": 0.01,
}
PARTS = {
    "grouped": {
        "num_key_value_heads": 2,
        "shared_expert_gate": True,
        "qk_norm": "full",
        "attention_bias": True,
        "attention_out_bias": True,
        "num_nextn_predict_layers": 1,
        "router_aux_loss_type": "global_batch",
        "router_z_loss_coef": 0.001,
        "output_z_loss_coef": 0.0001,
    },
    "latent": {
        "kv_lora_rank": 10,
        "q_lora_rank": 14,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "n_group": 4,
        "topk_group": 2,
    },
}


def config_of(part):
    return ModelConfig(**{**SHAPE, **PARTS[part]})


def saved_in_the_middle(folder, part):
    """Losses of three steps behind a save."""
    engine = make(2, config=config_of(part))
    train(engine, 3)
    save(engine, folder, 3)
    return train(engine, 3, 3)


def resumed(folder, part, ep_size):
    engine = make(ep_size, seed=99, config=config_of(part))
    assert restore_first_verified(engine, [folder / "step_3"])
    return train(engine, 3, 3)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_saved_and_resumed_on_other_ranks(tmp_path, part):
    expected, _ = run_ranks(2, saved_in_the_middle, tmp_path, part)
    assert run_ranks(2, resumed, tmp_path, part, 2)[0] == expected
    for ranks, ep_size in ((1, 1), (4, 4)):
        assert run_ranks(ranks, resumed, tmp_path, part, ep_size)[0] == pytest.approx(expected, rel=1e-5)


def names_by_kind():
    """Names of the parameters that are no expert's, and of those that DeepSpeed keeps in its file of such."""
    engine = make(2, config=config_of("grouped"))
    shared = {name for name, weight in engine.module.named_parameters() if getattr(weight, "allreduce", True)}
    kept = engine._get_non_moe_state_dict(dict(engine.module.named_parameters()))
    return shared, set(kept)


def test_deepspeed_takes_no_parameter_for_an_experts_that_is_none():
    shared, kept = run_ranks(2, names_by_kind)[0]
    assert kept == shared
    assert {"layers.1.shared_mlp.gate_proj.weight", "mtp.block.shared_gate.weight", "lm_head.weight"} <= kept
