"""Presets and the fields of a run; every refusal names the value, the limit and the remedy."""

import json
from pathlib import Path

import pytest
from refusals import has, only, refusals

from megamoe.config import MAX_EXPERTS, PRESET_DIR, ModelConfig, load_preset, preset_names, validate
from megamoe.errors import UserError
from megamoe.run_config import Corpus, RunConfig, parse_run

PRESETS = sorted(PRESET_DIR.glob("*.json"))


def shape(**changes):
    values = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_latent_tokens": 2,
        "max_position_embeddings": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not ...}


def shape_refusals(**changes):
    return refusals(validate, ModelConfig, shape(**changes), "my.json")


# --- what is shipped ---


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_shipped_preset_loads_with_what_its_file_says(path):
    config = load_preset(path.stem).model_dump()
    assert {key: config[key] for key in json.loads(path.read_text())} == json.loads(path.read_text())
    assert load_preset(str(path)).model_dump() == config


def test_the_default_preset_is_the_designed_model():
    assert RunConfig(ds_config="x").preset == "moe-680m"
    assert load_preset("moe-680m").model_dump() == {
        "vocab_size": 49152,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "hidden_act": "silu",
        "gated_mlp": False,
        "num_hidden_layers": 24,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_latent_tokens": 8,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "expert_dropout": 0.05,
        "router_jitter_noise": 0.01,
        "router_score": "softmax",
        "router_bias_rule": "sign",
        "router_bias_rate": 1e-3,
        "router_load_decay": 0.9,
        "initializer_range": 0.02,
        # parts that it does not have
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 0,
        "mtp_loss_coef": 0.3,
        "output_z_loss_coef": 0.0,
        "qk_norm": None,
        "attention_bias": False,
        "attention_out_bias": False,
        "sliding_window": None,
        "layer_types": None,
        "kv_lora_rank": None,
        "q_lora_rank": None,
        "qk_nope_head_dim": None,
        "qk_rope_head_dim": None,
        "v_head_dim": None,
        "partial_rotary_factor": 1.0,
        "moe_intermediate_size": None,
        "first_k_dense_replace": 0,
        "mlp_only_layers": [],
        "n_shared_experts": 0,
        "shared_expert_gate": False,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "router_bias": True,
        "router_aux_loss_coef": 0.0,
        "router_aux_loss_type": "sequence",
        "router_z_loss_coef": 0.0,
    }


def test_preset_names_are_the_files_that_ship():
    assert preset_names() == sorted(path.stem for path in PRESETS)
    assert {"moe-680m", "tiny"} <= set(preset_names())


# --- the model ---


def test_the_quantile_rule_is_refused_with_groups():
    grouped = {"router_bias_rule": "quantile", "num_local_experts": 8, "n_group": 4, "topk_group": 2}
    has(only(shape_refusals(**grouped)), "quantile", "topk_group is 2 of n_group 4", '"sign"')


def test_margins_are_counted_for_a_bias_that_needs_them():
    def counts(**changes):
        return ModelConfig(**shape(num_local_experts=8, router_bias_rule="quantile", **changes)).counts_margins

    assert counts(num_experts_per_tok=2)
    assert not counts(num_experts_per_tok=8)  # nothing to balance
    assert not counts(num_experts_per_tok=2, router_bias=False)


def test_an_unknown_preset_names_the_known_ones():
    has(only(refusals(load_preset, "tinny")), "'tinny'", "moe-680m", "tiny", ".json")
    has(only(refusals(load_preset, "no/such.json")), "no/such.json", "tiny")
    assert "directory" not in only(refusals(load_preset, "tinny"))  # which `find_preset` takes


def test_an_unknown_key_in_a_preset_names_the_nearest():
    has(only(shape_refusals(hidden_sise=3)), "my.json", '"hidden_sise"', 'did you mean "hidden_size"?')


def test_an_unknown_key_near_to_none_names_them_all():
    has(only(shape_refusals(zzz=3)), '"zzz"', "known keys are", "hidden_size", "rope_theta")


def test_a_missing_key_and_a_wrong_value_are_named():
    has(only(shape_refusals(hidden_size=...)), '"hidden_size"', "missing", "add it")
    has(only(shape_refusals(hidden_size=-3)), '"hidden_size"', "-3", "greater than 0", "change it")
    has(only(shape_refusals(head_dim=33)), '"head_dim"', "33", "multiple of 2")
    has(only(shape_refusals(expert_dropout=1)), '"expert_dropout"', "1", "less than 1")
    has(only(shape_refusals(router_score="softmx")), '"softmx"', "'softmax'", "'sigmoid'")


SIZES = {key for key, value in ModelConfig(**shape()).model_dump().items() if type(value) is int}


@pytest.mark.parametrize("key", sorted(SIZES - {"num_experts_per_tok"}))  # which num_local_experts bounds
def test_sizes_far_above_any_real_model_are_refused_before_anything_is_made(key):
    problems = shape_refusals(**{key: 10**12})
    (found,) = (problem for problem in problems if f'"{key}" is 1000000000000' in problem)
    has(found, "less than or equal to", "change it")


def test_layers_times_experts_are_bounded_too():
    problem = only(shape_refusals(num_hidden_layers=5000, num_local_experts=5000))
    has(problem, "num_hidden_layers 5000 x num_local_experts 5000", "25,000,000", f"{MAX_EXPERTS:,}", "lower one")
    validate(ModelConfig, shape(num_hidden_layers=126), "my.json")
    validate(ModelConfig, shape(num_hidden_layers=61, num_local_experts=2048), "my.json")


@pytest.mark.parametrize("value", ["64", True, None, 64.5, [64]])
def test_a_size_that_is_no_whole_number_is_refused(value):
    has(only(shape_refusals(hidden_size=value)), '"hidden_size"', json.dumps(value), "valid integer")


def test_numbers_in_quotes_are_refused_and_1e2_is_a_whole_number():
    has(only(shape_refusals(rms_norm_eps="1e-8")), '"rms_norm_eps"', '"1e-8"', "valid number")
    assert validate(ModelConfig, shape(vocab_size=1e2), "my.json").vocab_size == 100


def test_values_that_are_no_object_are_refused():
    for values in ([], "tiny", 3, None):
        has(only(refusals(validate, ModelConfig, values, "run.json: model")), "run.json: model", json.dumps(values))


def test_a_very_long_value_is_cut_in_its_sentence():
    assert len(only(shape_refusals(hidden_size="x" * 10**6))) < 400


def test_heads_that_do_not_divide_and_too_many_choices_are_refused():
    has(only(shape_refusals(num_key_value_heads=3)), "num_attention_heads is 4", "num_key_value_heads 3", "divisor")
    has(only(shape_refusals(num_experts_per_tok=5)), "num_experts_per_tok is 5", "num_local_experts 4", "lower it")


def test_three_mistakes_in_a_preset_give_three_sentences():
    problems = shape_refusals(hidden_sise=32, vocab_size=..., head_dim=-2)
    assert len(problems) == 3
    has(" ".join(problems), '"hidden_sise"', '"vocab_size"', '"head_dim"')


def test_a_mistake_in_one_field_does_not_hide_those_between_fields():
    problems = shape_refusals(hidden_sise=32, num_key_value_heads=3, num_experts_per_tok=5)
    assert len(problems) == 3, problems


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_rope_scaling_with_a_factor_is_accepted(kind):
    scaling = {"rope_type": kind, "factor": 2.5}
    assert validate(ModelConfig, shape(rope_scaling=scaling), "my.json").rope_scaling == scaling


def test_llama3_rope_scaling_needs_its_four_numbers():
    numbers = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    validate(ModelConfig, shape(rope_scaling={"rope_type": "llama3", **numbers}), "my.json")
    for name in numbers:
        fewer = {key: value for key, value in numbers.items() if key != name}
        has(only(shape_refusals(rope_scaling={"rope_type": "llama3", **fewer})), "llama3", name, "add it")


@pytest.mark.parametrize("scaling", [{"rope_type": "yarm", "factor": 2}, {"type": "linear", "factor": 2}, {}])
def test_an_unknown_rope_type_names_the_known_ones(scaling):
    kind = json.dumps(scaling.get("rope_type"))
    has(only(shape_refusals(rope_scaling=scaling)), "rope_type", kind, "linear", "dynamic", "yarn", "llama3")


def test_rope_scaling_without_a_factor_or_with_an_unknown_key_is_refused():
    has(only(shape_refusals(rope_scaling={"rope_type": "yarn"})), "yarn", "factor", "add it")
    problems = shape_refusals(rope_scaling={"rope_type": "yarn", "factr": 2})
    assert len(problems) == 2
    has(" ".join(problems), '"factr"', 'did you mean "factor"?')


@pytest.mark.parametrize("factor", ["two", 0, -2, None])
def test_a_rope_scaling_factor_that_is_no_positive_number_is_refused(factor):
    problem = only(shape_refusals(rope_scaling={"rope_type": "linear", "factor": factor}))
    has(problem, "factor", str(factor) if factor is not None else "null")


def test_a_rope_type_of_the_wrong_kind_is_refused():
    has(only(shape_refusals(rope_scaling={"rope_type": ["yarn"], "factor": 2})), "rope_type", "yarn", "linear")


# --- the run ---


@pytest.mark.parametrize(
    ("preset", "folder"),
    [
        ("tiny", "tiny"),
        ("mine/small.json", "small"),
        ("../v1.5.json", "v1.5"),
        ("hf/Qwen1.5-MoE", "Qwen1.5-MoE"),
        ("hf/Qwen1.5-MoE/", "Qwen1.5-MoE"),
        (".", "here.2"),
        ("..", "above"),
    ],
)
def test_the_run_folder_has_the_name_of_the_preset_by_default(tmp_path, monkeypatch, preset, folder):
    (tmp_path / "above" / "here.2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here.2")
    assert RunConfig(ds_config="x", preset=preset).folder == Path("runs") / folder
    assert RunConfig(ds_config="x", preset=preset, run_dir="mine").folder == Path("mine")


def test_data_is_a_path_or_a_path_with_its_weight():
    run = validate(RunConfig, {"ds_config": "x", "data": ["a", "b=2.5", "c=d=1"]}, "command line")
    assert run.data == [Corpus(path="a"), Corpus(path="b", weight=2.5), Corpus(path="c=d", weight=1)]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    has(only(refusals(validate, RunConfig, {"ds_config": "x", "data": [f"a={weight}"]}, "command line")), "weight")


def test_a_weight_that_is_no_number_is_refused_with_the_form_to_write():
    values = {"ds_config": "x", "data": ["a=much"]}
    has(only(refusals(validate, RunConfig, values, "command line")), "a=much", "PATH=WEIGHT")


@pytest.mark.parametrize(
    ("words", "seconds"), [("90", 5400), ("0.5", 30), ("0:00:25", 25), ("1:30:00", 5400), ("2-12:00:00", 216_000)]
)
def test_a_time_limit_is_written_as_slurm_writes_it(words, seconds):
    assert validate(RunConfig, {"ds_config": "x", "time_limit": words}, "command line").time_limit == seconds


@pytest.mark.parametrize("words", ["1:30", "soon", "1:2:3", "-5", "0"])
def test_a_time_limit_of_another_form_is_refused(words):
    has(only(refusals(validate, RunConfig, {"ds_config": "x", "time_limit": words}, "command line")), "time_limit")


def test_all_problems_of_a_command_line_come_at_once():
    problems = refusals(validate, RunConfig, {"data": ["a=0"], "steps": "-3", "seed": "x"}, "command line")
    assert len(problems) == 4
    has(" ".join(problems), '"ds_config"', '"steps"', "-3", '"seed"', "weight")


def test_a_weight_that_is_no_number_does_not_hide_the_other_problems():
    problems = refusals(validate, RunConfig, {"ds_config": "x", "data": ["a=much"], "steps": "-3"}, "command line")
    assert len(problems) == 2, problems


# --- the command line ---------------------------------------------------------------------------------------------


def test_the_command_line_has_an_option_for_every_field_and_its_defaults():
    run = parse_run(["--ds_config", "ds.json"])
    assert run == RunConfig(ds_config="ds.json")
    run = parse_run(["--ds_config", "a", "--data", "x=0.7", "y=0.3", "--steps", "5", "--resume", "--local_rank=1"])
    assert [(corpus.path, corpus.weight) for corpus in run.data] == [("x", 0.7), ("y", 0.3)]
    assert run.steps == 5
    assert run.resume
    run = parse_run(["--ds_config", "a", "--batch_ramp", "16:200", "32:500"])
    assert [(stage.samples, stage.last_step) for stage in run.batch_ramp] == [(16, 200), (32, 500)]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ['"ds_config" is missing']),
        (["--ds_config", "a", "--stepz", "3"], ['unknown option "--stepz"', 'did you mean "--steps"']),
        (["--ds_config", "a", "--seed", "1", "--seed", "2"], ["--seed is given twice, as 1 and as 2"]),
        (["--ds_config", "a", "--steps", "many"], ['"steps" is "many"', "integer"]),
        (["--ds_config", "a", "--ep_size", "0"], ['"ep_size" is "0"', "greater than 0"]),
        (["--ds_config", "a", "--data", "x=much"], ["'x=much'", "PATH=WEIGHT"]),
        (["--ds_config", "a", "--batch_ramp", "16"], ["'16'", "SAMPLES:STEP"]),
        (["--ds_config", "a", "--batch_ramp", "0:5"], ['"batch_ramp.0.samples" is 0', "greater than 0"]),
    ],
)
def test_a_bad_command_line_is_refused_with_the_value_and_the_remedy(words, parts):
    with pytest.raises(UserError) as caught:
        parse_run(words)
    (problem,) = caught.value.problems
    assert all(part in problem for part in parts), problem


def test_an_unknown_option_comes_with_the_other_problems():
    with pytest.raises(UserError) as caught:
        parse_run(["--stepz", "3", "--seed", "x", "--ep_size", "0"])
    said = caught.value.problems
    parts = ['unknown option "--stepz"', '"ds_config" is missing', '"seed" is "x"', '"ep_size" is "0"']
    assert len(said) == len(parts)
    assert all(any(part in problem for problem in said) for part in parts), said
