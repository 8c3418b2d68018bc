"""Parameters and FLOPs of a model, against published counts, by hand, and as torch counts them."""

import math

import pytest
import torch
from model_parts import PARTS, model_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megamoe.config.model import load_preset
from megamoe.model import dispatch
from megamoe.model.costs import active_parameter_count, parameter_count, train_flops_per_token
from megamoe.model.decoder import Decoder


def test_the_number_of_parameters_of_a_preset_is_the_published_one():
    # As transformers 5.24 builds the published configurations; its count has no balancing bias.
    published = {
        "olmoe-7b-a1b": 6_919_161_856,
        "qwen3-30b-a3b": 30_532_122_624,
        "moonlight-16b-a3b": 15_960_108_544,
        "moe-680m": 679_809_792,
    }
    assert {preset: parameter_count(load_preset(preset)) for preset in published} == published


def grouped_flops(left, right, *_, **__):
    """Of rows by their groups' weights, and of rows by rows, one product for each group; torch counts neither."""
    return 2 * math.prod(left) * right[-1]


BATCH, LENGTH = 3, 40
SLIDES = {"sliding": (True, False, True), "sliding_multi_token": (True, False, True, True)}  # the last: MTP's


def flops_of_a_step(config):
    """Of the products that torch dispatches, forward and backward."""
    ids = torch.randint(config.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    labels = ids[:, : LENGTH + config.num_nextn_predict_layers]
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops})
    with counter, sdpa_kernel(SDPBackend.MATH):  # the one whose products are counted
        Decoder(config)(ids[:, :LENGTH], labels).backward()
    return counter.get_total_flops()


def flops_but_for_what_no_query_sees(part):
    """What a step of the model with this part needs, by the plan, and scores that are computed and masked."""
    config = model_of(part)
    heads, window, latents = config.num_attention_heads, config.sliding_window or 0, config.num_latent_tokens
    # Every score is computed, of a block with a window by the mask; latent attention's values of 6 are filled up to 12.
    # Latent tokens have queries too.
    computed = BATCH * (LENGTH + latents) ** 2 * heads * (12 + 12)
    per_head = 12 + 6 if config.kv_lora_rank else 12 + 12
    seen = [LENGTH / 2] * (config.num_hidden_layers + config.num_nextn_predict_layers)
    if part.startswith("sliding"):
        seen = [window - window**2 / (2 * LENGTH) if slides else LENGTH / 2 for slides in SLIDES[part]]
    extra = 6 * sum(computed - BATCH * LENGTH * (visible + latents) * heads * per_head for visible in seen)
    # The latents' queries, keys, values and results, in every row; but nothing flows back to their results, and so the
    # gradients by what made these are products of zeros.
    projected = 2 * (heads + config.num_key_value_heads) * config.head_dim * config.hidden_size
    extra += 6 * config.num_hidden_layers * BATCH * latents * projected
    planned = BATCH * LENGTH * train_flops_per_token(config, LENGTH)
    return planned + extra


def test_planned_flops_of_every_part_are_those_of_a_training_step_but_for_what_no_query_sees(monkeypatch):
    monkeypatch.setattr(dispatch, "CPU_ROW_MULTIPLE", 1)  # no fill rows
    for part in PARTS:
        expected = flops_but_for_what_no_query_sees(part)
        assert flops_of_a_step(model_of(part)) == pytest.approx(expected, rel=1e-12), part


def test_a_token_takes_all_parameters_but_those_of_the_experts_that_it_is_not_sent_to():
    config = load_preset("moe-680m")
    assert parameter_count(config) - active_parameter_count(config) == 24 * (8 - 2) * 2 * 768 * 2048
