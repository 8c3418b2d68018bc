"""What does not fit between the fields of a model's configuration: one sentence each, all at once."""

import json

import pytest
from model_parts import LLAMA_3
from refusals import has, only, refusals
from toy import PRESET

from megamoe.config.model import ModelConfig, validate
from megamoe.config.model_checks import MAX_EXPERTS, ROPE_SCALINGS


def misfits(**changes):
    return refusals(validate, ModelConfig, {**PRESET, **changes}, "my.json")


LATENT = {
    "num_latent_tokens": 0, "num_key_value_heads": 4, "kv_lora_rank": 10, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
MISFITS = [
    ({"mlp_only_layers": [1, 5]}, ["mlp_only_layers has 5", "0 to 1", "remove it"]),
    ({"mlp_only_layers": [-1]}, ["mlp_only_layers has -1", "0 to 1"]),
    ({"first_k_dense_replace": 1, "mlp_only_layers": [1]}, ["all 2 blocks are dense", "[1]", "leave one"]),
    ({"first_k_dense_replace": 3}, ["all 2 blocks are dense", "first_k_dense_replace 3"]),
    ({"num_latent_tokens": 0, "sliding_window": 4, "layer_types": [SLIDING]}, ["has 1 entries for 2 blocks"]),
    ({"layer_types": [SLIDING, FULL]}, ["sliding layers without a sliding_window"]),
    ({"num_latent_tokens": 0, "sliding_window": 4, "layer_types": [FULL, FULL]}, ["sliding_window is 4", "no sliding"]),
    ({"sliding_window": 4}, ["num_latent_tokens is 3, which sliding_window 4", "leave one"]),
    ({"shared_expert_gate": True}, ["shared_expert_gate is true", "set n_shared_experts"]),
    ({"n_group": 2, "topk_group": 3}, ["topk_group is 3, above n_group 2"]),
    ({"n_group": 3}, ["n_group 3 does not divide num_local_experts 4"]),
    ({"n_group": 4}, ["n_group 4 does not divide num_local_experts 4 into groups of two or more"]),
    ({"num_experts_per_tok": 3, "n_group": 2}, ["num_experts_per_tok is 3", "the 2 experts of topk_group 1"]),
    ({"partial_rotary_factor": 0.4}, ["partial_rotary_factor 0.4 rotates 3 of the 8", "even number"]),
    ({"partial_rotary_factor": 0.1}, ["partial_rotary_factor 0.1 rotates 0 of the 8", "2 or more"]),
    ({"v_head_dim": 4, "q_lora_rank": 3}, ["(v_head_dim, q_lora_rank) needs kv_lora_rank", "qk_rope_head_dim too"]),
    ({**LATENT, "qk_nope_head_dim": 5, "qk_rope_head_dim": 3}, ["qk_rope_head_dim is 3", "even number"]),
    ({**LATENT, "head_dim": 12}, ["head_dim is 12, not the sum of qk_nope_head_dim 4", "set it to 8"]),
    ({**LATENT, "num_key_value_heads": 2}, ["num_attention_heads 4; set num_key_value_heads to it, not 2"]),
    ({**LATENT, "num_latent_tokens": 2}, ["num_latent_tokens is 2, which latent attention has no place for"]),
    ({**LATENT, "qk_norm": "head"}, ['qk_norm is "head", which latent attention has no place for']),
    ({**LATENT, "partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5, which latent attention has no place"]),
    (
        {"router_bias_rule": "quantile", "n_group": 2, "num_experts_per_tok": 1},
        ['"quantile"', "topk_group is 1 of n_group 2", '"sign"'],
    ),
    ({"num_key_value_heads": 3}, ["num_attention_heads is 4", "num_key_value_heads 3", "divisor"]),
    ({"num_experts_per_tok": 5}, ["num_experts_per_tok is 5", "num_local_experts 4", "lower it"]),
    (
        {"num_hidden_layers": 5000, "num_local_experts": 5000},
        ["num_hidden_layers 5000 x num_local_experts 5000", "25,000,000", f"{MAX_EXPERTS:,}", "lower one"],
    ),
    *(
        ({"rope_scaling": {"rope_type": kind, "factor": 2}}, ["rope_type", json.dumps(kind), *ROPE_SCALINGS])
        for kind in ("yarm", ["yarn"])
    ),
    ({"rope_scaling": {}}, ["rope_type is null", *ROPE_SCALINGS]),
    ({"rope_scaling": {"rope_type": "yarn"}}, ["yarn", "factor", "add it"]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, ["llama3", "high_freq_factor, low_freq_factor, original"]),
    *(
        ({"rope_scaling": {"rope_type": "linear", "factor": factor}}, [f"factor is {json.dumps(factor)}"])
        for factor in ("two", 0, None)
    ),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2, "factr": 2}}, ['"factr"', 'did you mean "factor"?']),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 3}}, ["beta_fast is 3", '"linear" does not']),
    ({"rope_scaling": {**LLAMA_3, "attention_factor": 1}}, ["attention_factor is 1", '"llama3" does not read']),
    ({"rope_scaling": {**LLAMA_3, "low_freq_factor": 4}}, ["low_freq_factor is 4, not below high_freq_factor 4.0"]),
    (
        {"partial_rotary_factor": 0.25, "rope_scaling": {"rope_type": "dynamic", "factor": 2}},
        ['"dynamic" needs 4 or more rotated dimensions of a head, not 2'],
    ),
]


@pytest.mark.parametrize(("changes", "parts"), MISFITS, ids=lambda one: one[0] if isinstance(one, list) else "")
def test_fields_that_do_not_fit_each_other_are_refused_with_one_sentence(changes, parts):
    has(only(misfits(**changes)), "my.json: ", *parts)


def test_wrong_fields_and_misfits_of_several_kinds_come_at_once():
    several = {
        "hidden_sise": 32, "intermediate_size": -2, "mlp_only_layers": [5], "n_group": 3, "topk_group": 4,
        "shared_expert_gate": True, "partial_rotary_factor": 0.4, "num_key_value_heads": 3, "num_experts_per_tok": 5,
        "rope_scaling": {"rope_type": "linear", "factor": 0, "mscale": 1},
    }  # fmt: skip
    problems = misfits(**several)
    parts = ("topk_group is 4", "n_group 3 does not divide", "rotates 3", "factor is 0", "mscale")
    has(" ".join(problems), *several.keys() - {"partial_rotary_factor", "rope_scaling"}, *parts)
    assert len(problems) == 11, problems


def test_a_field_that_is_wrong_itself_has_one_sentence_and_none_with_others():
    for name, value in {
        "num_attention_heads": "4",
        "num_key_value_heads": 0,
        "head_dim": "8",
        "qk_rope_head_dim": "4",
        "qk_norm": "heads",
        "num_latent_tokens": "3",
        "partial_rotary_factor": 2,
    }.items():
        has(only(misfits(**{**LATENT, name: value})), f'"{name}" is')


def test_a_factor_that_is_a_quotient_rotates_as_many_dimensions_as_it_says():
    from megamoe.formats.huggingface.configuration_megamoe import MegaMoeConfig

    for head_dim in (64, 80, 88, 96, 128):
        for rotated in range(2, head_dim + 1, 2):
            changes = {"head_dim": head_dim, "partial_rotary_factor": rotated / head_dim}
            assert validate(ModelConfig, {**PRESET, **changes}, "my.json").rotary_dim == rotated
            assert MegaMoeConfig(**changes).rotary_dim == rotated
