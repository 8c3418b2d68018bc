"""Rows of several documents against each document alone, in float64, and the kernel against one call for each."""

import itertools

import numpy as np
import pytest
import torch
from exported import random_decoder
from model_parts import model_of

from megamoe.data.document_bounds import Documents
from megamoe.data.source import NO_LABEL
from megamoe.model import document_attention
from megamoe.model.document_attention import DocumentMask, attend, takes_lengths

LENGTH = 20
STARTS = [np.array([5, 6, 13]), np.array([9])]
TOKENS = [LENGTH, 17]  # of each row; what follows is padding
DOCUMENTS = Documents.of(STARTS, TOKENS, LENGTH)
NO_AUXILIARY = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}  # which are of rows, not of documents
KINDS = ["plain_scores", "latent_tokens", "full_norm_out_bias", "sliding_multi_token", "compressed_queries"]
KINDS += ["yarn_latent_attention", "untied_multi_token", "dense_layers"]
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4}
CASES = {kind: (kind, {}, 1e-10) for kind in KINDS} | {"dynamic": ("latent_tokens", DYNAMIC, 1e-6)}  # angles are fp32


def documents_alone(ids, ahead):
    """(row, start, stop, ids (1, L), labels (1, L + ahead)) of each: its end is what the next one begins with."""
    for row, (starts, tokens) in enumerate(zip(STARTS, TOKENS, strict=True)):
        for start, stop in itertools.pairwise([0, *starts.tolist(), tokens]):
            labels = torch.full((1, stop - start + ahead), NO_LABEL)
            known = LENGTH + 1 + ahead if stop == LENGTH else stop + (stop < tokens)
            labels[0, : known - start - 1] = ids[row, start + 1 : known]
            yield row, start, stop, ids[row : row + 1, start:stop], labels


def rows_of(parts, ahead):
    labels = torch.full((2, LENGTH + ahead), NO_LABEL)
    for row, start, stop, _, of_document in parts:
        labels[row, start : stop + ahead] = of_document
    return labels


def step_counts(model):
    return [router.step_counts.tolist() for router in model.routers()]


@pytest.mark.parametrize("recompute", [None, "whole", "selective"])
@pytest.mark.parametrize("case", CASES)
def test_rows_of_documents_give_logits_losses_gradients_and_counts_of_each_document_alone(case, recompute):
    part, changes, tolerance = CASES[case]
    config = model_of(part, **NO_AUXILIARY, **changes)
    packed, alone = (random_decoder(config, std=0.3).double().train() for _ in range(2))
    packed.recompute_blocks, packed.recompute = 3 if recompute else 0, recompute
    ahead = config.num_nextn_predict_layers
    ids = torch.randint(101, (2, LENGTH + 1 + ahead), generator=torch.Generator().manual_seed(1))
    parts = list(documents_alone(ids, ahead))

    loss = packed(ids[:, :LENGTH], rows_of(parts, ahead), documents=DOCUMENTS)
    loss.backward()
    total = sum(alone(of_document, labels) * of_document.numel() for *_, of_document, labels in parts) / (2 * LENGTH)
    total.backward()
    assert abs(loss - total) < tolerance
    for weight, expected in zip(packed.parameters(), alone.parameters(), strict=True):
        assert weight.grad.abs().max() > 0
        torch.testing.assert_close(weight.grad, expected.grad, rtol=0, atol=tolerance)
    assert step_counts(packed) == step_counts(alone)
    with torch.no_grad():
        logits = packed(ids[:, :LENGTH], documents=DOCUMENTS)
        for row, start, stop, of_document, _ in parts:
            expected = alone(of_document)[0]
            torch.testing.assert_close(logits[row, start:stop], expected, rtol=0, atol=10 * tolerance)


# --- kernels ----------------------------------------------------------------------------------------------------------


def varlen_reference(query, key, value, starts, key_starts, longest, longest_keys, *, scale, window_size, enable_gqa):
    """torch's `varlen_attn` by its documentation and that of flash attention, whose causal mask and window count from
    the last query and the last key."""
    assert {starts.dtype, key_starts.dtype} == {torch.int32}
    assert enable_gqa
    assert query.shape[2] == key.shape[2] == value.shape[2]
    assert query.shape[2] % 8 == 0
    outs, sizes = [], []
    for queries, keys in zip(itertools.pairwise(starts.tolist()), itertools.pairwise(key_starts.tolist()), strict=True):
        q, k, v = query[slice(*queries)], key[slice(*keys)], value[slice(*keys)]
        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
        behind = torch.arange(len(q)).unsqueeze(1) + len(k) - len(q) - torch.arange(len(k))
        hidden = (behind < 0) | ((behind > window_size[0]) if window_size[0] >= 0 else False)
        assert window_size[1] == 0
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
        sizes.append((len(q), len(k)))
    assert (longest, longest_keys) == tuple(max(size) for size in zip(*sizes, strict=True))
    return torch.cat(outs)


HEADS = {  # heads, key/value heads, width of keys and of values, latents, window
    "grouped": (4, 2, 8, 8, 0, None),
    "latents": (4, 2, 12, 12, 3, None),
    "narrow values": (4, 4, 12, 6, 0, None),
    "window": (4, 1, 8, 8, 0, 4),
}


@pytest.mark.parametrize("multiple", [1, 8])  # of the positions in each call, as of 64 in 16 bits
@pytest.mark.parametrize("kind", HEADS)
def test_one_call_gives_the_outputs_and_gradients_of_one_for_each_document(kind, multiple, monkeypatch):
    monkeypatch.setattr(document_attention, "varlen_attn", varlen_reference)
    monkeypatch.setitem(document_attention.MULTIPLES, torch.float64, multiple)
    heads, groups, width, of_value, latents, window = HEADS[kind]
    generator = torch.Generator().manual_seed(1)
    shapes = (heads, LENGTH, width), (groups, latents + LENGTH, width), (groups, latents + LENGTH, of_value)
    inputs = [torch.randn(2, *shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    grad = torch.randn(2, LENGTH, heads * of_value, dtype=torch.float64, generator=generator)
    masks = [DocumentMask.of(DOCUMENTS, is_one_call, latents, window) for is_one_call in (True, False)]
    outs = [attend(*inputs, mask, 0.3) for mask in masks]
    found, expected = ((out, *torch.autograd.grad(out, inputs, grad)) for out in outs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_lengths_are_for_gpus_in_16_bits_with_heads_that_flash_attention_takes():
    for device, dtype, width, expected in (
        ("meta", torch.bfloat16, 256, True), ("meta", torch.float16, 64, True), ("meta", torch.bfloat16, 264, False),
        ("meta", torch.float32, 64, False), ("cpu", torch.bfloat16, 64, False),
    ):  # fmt: skip
        assert takes_lengths(torch.empty(1, dtype=dtype, device=device), width) == expected
