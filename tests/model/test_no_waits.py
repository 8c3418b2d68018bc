"""No layer waits for the device, but for the one read with which expert parallelism learns how many rows come."""

import numpy as np
import pytest
import torch
from fake_gpu import DEVICE, count_reads, fake_gpu, model_on_gpu
from model_parts import PARTS, model_of
from ranks import run_alone

from megamoe.data.document_bounds import Documents

LENGTH = 32


# Without those of which another has what they have.
KINDS = [part for part in PARTS if part not in ("shared_experts", "sliding", "latent_attention", "full_norm_out_bias")]


def reads_of_passes(kinds, ep_size, recompute_blocks=0, with_documents=False):
    """Of the model with each of the parts, one after the other in this process."""
    return {part: reads_of_a_pass(part, ep_size, recompute_blocks, with_documents) for part in kinds}


def reads_of_a_pass(part, ep_size, recompute_blocks, with_documents):
    config = model_of(part, expert_dropout=0.05, router_jitter_noise=0.01)
    with fake_gpu():
        model = model_on_gpu(config, ep_size)
        model.recompute_blocks = recompute_blocks
        rows = 2 * LENGTH * config.num_experts_per_tok
        reads = count_reads([[[rows // ep_size, rows // ep_size]] * ep_size] * 2)
        ids = torch.empty(2, LENGTH + config.num_nextn_predict_layers, dtype=torch.int64, device=DEVICE)
        documents = Documents.of([np.array([5]), np.array([9, 20])], [LENGTH, 30], LENGTH) if with_documents else None
        documents = documents and documents.map(lambda one: torch.empty(one.shape, dtype=one.dtype, device=DEVICE))
        loss = model(ids[:, :LENGTH], ids, documents=documents)
        assert loss.device.type == DEVICE
        loss.backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert weight.grad.device.type == DEVICE
        return reads.count


@pytest.mark.parametrize("with_documents", [False, True])
def test_a_pass_without_expert_parallelism_reads_nothing(with_documents):
    assert run_alone(reads_of_passes, KINDS, 1, 0, with_documents) == dict.fromkeys(KINDS, 0)


@pytest.mark.parametrize(("kinds", "recompute_blocks"), [(KINDS, 0), (["latent_tokens", "dense_layers"], 2)])
def test_a_pass_with_expert_parallelism_reads_once_per_layer_and_again_where_it_recomputes(kinds, recompute_blocks):
    blocks = {part: model_of(part).sparse_blocks for part in kinds}
    expected = {part: sum(1 + (block < recompute_blocks) for block in sparse) for part, sparse in blocks.items()}
    assert run_alone(reads_of_passes, kinds, 4, recompute_blocks) == expected


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
