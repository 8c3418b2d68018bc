"""Whether weights are those of a model, and what is said where they are not."""

import pytest
from exported import random_source
from refusals import has, only
from toy import PRESET

from megamoe.config.model import ModelConfig
from megamoe.formats.source_checks import model_problems

CONFIG = ModelConfig(**PRESET)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def changed(**changes):
    return ModelConfig(**{**PRESET, **changes})


# What the weights are of, what they should be of, and what is said; nothing where they fit.
OTHER_MODELS = [
    ({}, {}, []),
    ({}, {"hidden_size": 64}, ["model.embed_tokens.weight has the shape (96, 32), not (96, 64)"]),
    ({}, {"num_hidden_layers": 3}, ["made with num_hidden_layers 2, not 3"]),
    ({}, {"num_local_experts": 2}, ["num_local_experts 4, not 2"]),
    ({}, {"num_key_value_heads": 4}, ["self_attn.k_proj.weight has the shape (16, 32), not (32, 32)"]),
    ({}, {"num_hidden_layers": 3, "num_local_experts": 2}, ["num_hidden_layers 2, not 3", "experts 4, not 2"]),
    ({}, {"num_latent_tokens": 0}, ["has, beyond the model, model.layers.0.self_attn.latents"]),
    ({}, {"gated_mlp": True}, ["lacks model.layers.0.moe.experts.0.gate_proj.weight"]),
    ({}, {"num_nextn_predict_layers": 1}, ["lacks model.mtp."]),
    ({"num_nextn_predict_layers": 1}, {}, []),
    ({"first_k_dense_replace": 1}, {}, ["lacks model.layers.0.moe."]),
    ({"qk_norm": "full"}, {"qk_norm": "head"}, ["self_attn.q_norm.weight has the shape (32,), not (8,)"]),
    ({}, {"tie_word_embeddings": False}, ["lacks lm_head.weight"]),
    ({"tie_word_embeddings": False}, {}, ["tie_word_embeddings false, not true"]),
]


@pytest.mark.parametrize(("made", "wanted", "fields"), OTHER_MODELS)
def test_weights_of_another_model_are_refused_with_what_differs(made, wanted, fields):
    problems = model_problems(random_source(changed(router_bias=False, **made)), changed(**wanted), "it")
    assert len(problems) == len(fields)
    for problem, field in zip(problems, fields, strict=True):
        has(problem, field, "use the")


def test_a_head_that_equals_the_embedding_fits_a_model_that_ties_it_and_one_that_does_not():
    source = random_source(changed(tie_word_embeddings=False))
    source.tensors[HEAD] = source.tensors[EMBEDDING]
    for tied in (False, True):
        assert model_problems(source, changed(tie_word_embeddings=tied), "it") == []


def test_a_balancing_bias_that_the_model_has_no_place_for_is_refused_unless_it_is_zero():
    source, without = random_source(CONFIG), changed(router_bias=False)
    has(only(model_problems(source, without, "it")), "balancing bias", "router_bias is false")
    for bias in source.buffers.values():
        bias.zero_()
    assert model_problems(source, without, "it") == []
