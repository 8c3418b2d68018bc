"""No layer waits for the device, but for the one read with which expert parallelism learns how many rows come."""

import pytest
import torch
from fake_gpu import DEVICE, count_reads, fake_gpu, model_on_gpu
from ranks import run_alone

from megamoe.config.model import load_preset

CONFIG = load_preset("tiny").model_copy(
    update={"num_hidden_layers": 2, "expert_dropout": 0.05, "router_jitter_noise": 0.01}
)
BATCH, LENGTH = 2, 64


def reads_of_a_pass(config, ep_size, recompute_blocks=0):
    with fake_gpu():
        model = model_on_gpu(config, ep_size)
        model.recompute_blocks = recompute_blocks
        rows = BATCH * LENGTH * config.num_experts_per_tok
        reads = count_reads([[rows // ep_size] * ep_size] * 2)
        ids = torch.empty(BATCH, LENGTH + config.num_nextn_predict_layers, dtype=torch.int64, device=DEVICE)
        loss = model(ids[:, :LENGTH], ids)
        assert loss.device.type == DEVICE
        loss.backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert weight.grad.device.type == DEVICE
        return reads.count


PARTS = {
    "plain": {},
    "gated, sigmoid": {"gated_mlp": True, "router_score": "sigmoid"},
    "groups, losses": {
        "router_score": "sigmoid",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.001,
        "output_z_loss_coef": 0.0001,
    },
    "plain scores, global loss": {
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
        "router_aux_loss_type": "global_batch",
    },
    "dense, shared, windows, multi-token": {
        "num_latent_tokens": 0,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "shared_expert_gate": True,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 1,
        "qk_norm": "head",
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "sliding_window": 16,
    },
    "latent attention": {
        "num_latent_tokens": 0,
        "num_key_value_heads": 2,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    "interleaved, scaled": {"rope_interleaved": True, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
}


def reads_of_passes(ep_size):
    """Of the model with each of the parts, one after the other in this process."""
    return {name: reads_of_a_pass(CONFIG.model_copy(update=parts), ep_size) for name, parts in PARTS.items()}


def test_a_pass_without_expert_parallelism_reads_nothing():
    assert run_alone(reads_of_passes, 1) == dict.fromkeys(PARTS, 0)


def test_a_pass_with_expert_parallelism_reads_once_per_layer():
    layers = {name: len(CONFIG.model_copy(update=parts).sparse_blocks) for name, parts in PARTS.items()}
    assert run_alone(reads_of_passes, 4) == layers


def test_a_recomputed_block_reads_again():
    assert run_alone(reads_of_a_pass, CONFIG, 4, 1) == CONFIG.num_hidden_layers + 1


def reads_item():
    with fake_gpu():
        return torch.ones(1, device=DEVICE).item()


def copies_to_the_host():
    with fake_gpu():
        return torch.ones(1, device=DEVICE).to("cpu").device.type


@pytest.mark.parametrize("waits", [reads_item, copies_to_the_host])
def test_what_waits_is_found(waits):
    with pytest.raises(AssertionError, match=r"copies between|DataDependentOutput"):
        run_alone(waits)
