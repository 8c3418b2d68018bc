"""Presets, DeepSpeed JSON and what fits between them; every refusal names the value, the limit and the remedy."""

import itertools
import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from megamoe.config import (
    PRESET_DIR,
    Corpus,
    ModelConfig,
    RunConfig,
    UserError,
    batch_sizes,
    deepspeed_problems,
    dtype_of,
    load_preset,
    preset_names,
    read_json,
    read_schedule,
    run_problems,
    validate,
)

PRESETS = sorted(PRESET_DIR.glob("*.json"))
DS_CONFIGS = sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json"))
SCHEDULE = {"warmup_type": "linear", "warmup_max_lr": 0.002, "warmup_num_steps": 10, "total_num_steps": 100}


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


def ds_json(**changes):
    values = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {}},
        "scheduler": {"type": "WarmupDecayLR", "params": SCHEDULE},
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not ...}


def with_schedule(**changes):
    params = {key: value for key, value in {**SCHEDULE, **changes}.items() if value is not ...}
    return ds_json(scheduler={"type": "WarmupDecayLR", "params": params})


def sentences(problems):
    for problem in problems:
        assert problem.endswith((".", "?")), problem
        assert "\n" not in problem
    return problems


def refusals(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    return sentences(caught.value.problems)


def shape_refusals(**changes):
    return refusals(validate, ModelConfig, shape(**changes), "my.json")


def ds_refusals(ds, world_size=1, on_cpu=True):
    return sentences(deepspeed_problems(ds, "ds.json", world_size, on_cpu))


def only(problems):
    assert len(problems) == 1, problems
    return problems[0]


def has(problem, *parts):
    assert all(part in problem for part in parts), problem


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
    }


def test_preset_names_are_the_files_that_ship():
    assert preset_names() == [path.stem for path in PRESETS]
    assert {"moe-680m", "tiny"} <= set(preset_names())


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_deepspeed_json_has_no_problem(path, world_size, on_cpu):
    assert deepspeed_problems(read_json(path), str(path), world_size, on_cpu) == []


def test_the_recipes_of_the_issue_are_shipped():
    assert {path.name for path in DS_CONFIGS} >= {"zero2.json", "zero1.json", "zero2_fp32.json", "zero2_offload.json"}
    by_name = {path.stem: read_json(path) for path in DS_CONFIGS}
    assert by_name["zero1"]["zero_optimization"]["stage"] == 1
    assert dtype_of(by_name["zero2_fp32"]) == "fp32"
    assert by_name["zero2_offload"]["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_zero2_is_the_original_recipe():
    ds = read_json(next(path for path in DS_CONFIGS if path.stem == "zero2"))
    assert ds["zero_optimization"]["stage"] == 2
    assert dtype_of(ds) == "bf16"
    assert ds["gradient_clipping"] == 1.0
    assert ds["optimizer"]["type"] == "AdamW"
    assert ds["optimizer"]["params"].items() >= {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01}.items()
    assert ds["data_types"]["grad_accum_dtype"] == "fp32"
    assert batch_sizes(ds, 8) == (2, 1)
    schedule = read_schedule(ds, "zero2.json")
    assert schedule.warmup_min_lr == 0
    assert (schedule.warmup_max_lr, schedule.warmup_num_steps, schedule.total_num_steps) == (1.5e-3, 1000, 10000)


# --- reading JSON ---


def test_a_key_given_twice_with_different_values_is_refused_with_both(tmp_path):
    path = tmp_path / "a.json"
    for text in ('{"hidden_size": 64, "hidden_size": 128}', '{"scheduler": {"lr": 64, "lr": 128}}'):
        path.write_text(text)
        has(only(refusals(read_json, path)), str(path), "given twice", "64", "128", "keep one")


def test_a_key_given_twice_with_the_same_value_is_fine(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"hidden_size": 64, "hidden_size": 64}')
    assert read_json(path) == {"hidden_size": 64}


def test_broken_json_is_refused_with_the_place(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n "a": 1,\n "b" 2}')
    has(only(refusals(read_json, path)), str(path), "line 3", "mend")


def test_a_json_file_that_is_missing_undecodable_or_no_object_is_refused(tmp_path):
    has(only(refusals(read_json, tmp_path / "no.json")), "no.json", "cannot be read", "give the path")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    has(only(refusals(read_json, tmp_path / "latin.json")), "latin.json", "0xe9")
    (tmp_path / "list.json").write_text("[1, 2]")
    has(only(refusals(read_json, tmp_path / "list.json")), "list.json", "list", "object")


# --- the model ---


def test_an_unknown_preset_names_the_known_ones():
    has(only(refusals(load_preset, "tinny")), "'tinny'", "moe-680m", "tiny", ".json")
    has(only(refusals(load_preset, "no/such.json")), "no/such.json", "tiny")


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
    kind = repr(scaling.get("rope_type"))
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


def test_data_is_a_path_or_a_path_with_its_weight():
    run = validate(RunConfig, {"ds_config": "x", "data": ["a", "b=2.5", "c=d=1"]}, "command line")
    assert run.data == [Corpus(path="a"), Corpus(path="b", weight=2.5), Corpus(path="c=d", weight=1)]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    has(only(refusals(validate, RunConfig, {"ds_config": "x", "data": [f"a={weight}"]}, "command line")), "weight")


def test_a_weight_that_is_no_number_is_refused_with_the_form_to_write():
    values = {"ds_config": "x", "data": ["a=much"]}
    has(only(refusals(validate, RunConfig, values, "command line")), "a=much", "PATH=WEIGHT")


def test_all_problems_of_a_command_line_come_at_once():
    problems = refusals(validate, RunConfig, {"data": ["a=0"], "steps": "-3", "seed": "x"}, "command line")
    assert len(problems) == 4
    has(" ".join(problems), '"ds_config"', '"steps"', "-3", '"seed"', "weight")


def test_a_weight_that_is_no_number_does_not_hide_the_other_problems():
    problems = refusals(validate, RunConfig, {"ds_config": "x", "data": ["a=much"], "steps": "-3"}, "command line")
    assert len(problems) == 2, problems


# --- the DeepSpeed JSON ---


def test_a_plain_deepspeed_json_has_no_problem():
    assert deepspeed_problems(ds_json(), "ds.json", 4, True) == []


@pytest.mark.parametrize(
    ("section", "wrong", "right"),
    [
        (None, "zero_optimisation", "zero_optimization"),
        (None, "train_micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("zero_optimization", "overlap_com", "overlap_comm"),
        ("optimizer", "parms", "params"),
        ("scheduler", "tipe", "type"),
        ("bf16", "enabeld", "enabled"),
        ("fp16", "loss_scaling", "loss_scale"),
        ("data_types", "grad_acum_dtype", "grad_accum_dtype"),
    ],
)
def test_an_unknown_key_in_a_deepspeed_json_names_the_nearest(section, wrong, right):
    ds = ds_json(**{wrong: 1}) if section is None else ds_json()
    if section:
        ds[section] = {**ds.get(section, {}), wrong: 1}
    problem = only(ds_refusals(ds))
    has(problem, "ds.json", section or "", f'"{wrong}"', f'did you mean "{right}"?')


def test_an_unknown_key_of_the_schedule_names_the_nearest():
    has(only(ds_refusals(with_schedule(warmup_maxlr=1))), "scheduler.params", 'did you mean "warmup_max_lr"?')


@pytest.mark.parametrize(
    ("ds", "wrong", "right"),
    [
        (ds_json(optimizer={"type": "AdamW", "params": {"weight_deacy": 0.1}}), "weight_deacy", "weight_decay"),
        (ds_json(zero_optimization={"stage": 2, "offload_optimizer": {"devise": "cpu"}}), "devise", "device"),
        (ds_json(tensorboard={"enabeld": True}), "enabeld", "enabled"),
    ],
    ids=["optimizer.params", "offload_optimizer", "tensorboard"],
)
def test_an_unknown_key_deeper_in_a_deepspeed_json_names_the_nearest(ds, wrong, right):
    has(only(ds_refusals(ds)), f'"{wrong}"', f'did you mean "{right}"?')


@pytest.mark.parametrize("section", ["bf16", "fp16", "zero_optimization", "optimizer", "scheduler", "data_types"])
def test_a_section_that_is_no_object_is_refused(section):
    has(only(ds_refusals(ds_json(**{section: True}))), "ds.json", f'"{section}"', "true", "object")


@pytest.mark.parametrize("params", [None, [1], 5])
@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_params_that_are_no_object_are_refused(section, params):
    ds = ds_json()
    ds[section] = {**ds[section], "params": params}
    has(only(ds_refusals(ds)), section, "params", json.dumps(params), "object")


def test_zero_3_is_refused_with_its_reason_and_stage_0_with_the_choices():
    has(only(ds_refusals(ds_json(zero_optimization={"stage": 3}))), "stage is 3", "MoE", "1 or 2")
    has(only(ds_refusals(ds_json(zero_optimization={"stage": 0}))), "stage is 0", "1 or 2")
    has(only(ds_refusals(ds_json(zero_optimization=...))), "stage is 0", "1 or 2")
    has(only(ds_refusals(ds_json(zero_optimization={"stage": "2"}))), 'stage is "2"', "1 or 2")


@pytest.mark.parametrize("key", ["contiguous_gradients", "reduce_scatter"])
def test_zero_2_needs_what_its_experts_need_and_zero_1_does_not(key):
    has(only(ds_refusals(ds_json(zero_optimization={"stage": 2, key: False}))), key, "false", "set it to true")
    assert ds_refusals(ds_json(zero_optimization={"stage": 1, key: False})) == []


@pytest.mark.parametrize("scale", [..., 0, 0.0, -1])
def test_fp16_on_cpu_without_a_loss_scale_is_refused(scale):
    fp16 = {"enabled": True} if scale is ... else {"enabled": True, "loss_scale": scale}
    problem = only(ds_refusals(ds_json(bf16=..., fp16=fp16)))
    has(problem, "fp16", "CPU", "null" if scale is ... else str(scale), "above 0", "bf16")


def test_fp16_is_fine_with_a_loss_scale_and_without_one_on_a_gpu():
    assert ds_refusals(ds_json(bf16=..., fp16={"enabled": True, "loss_scale": 128})) == []
    assert ds_refusals(ds_json(bf16=..., fp16={"enabled": True}), on_cpu=False) == []
    assert ds_refusals(ds_json(fp16={"enabled": False})) == []


def test_bf16_and_fp16_together_are_refused():
    for on_cpu in (True, False):
        problem = only(ds_refusals(ds_json(fp16={"enabled": True, "loss_scale": 128}), on_cpu=on_cpu))
        has(problem, "given twice", "bf16", "fp16", "disable one")


def test_the_precision_is_that_of_the_enabled_section():
    assert dtype_of({"bf16": {"enabled": True}}) == "bf16"
    assert dtype_of({"fp16": {"enabled": True}, "bf16": {"enabled": False}}) == "fp16"
    assert dtype_of({"fp16": {}}) == dtype_of({}) == "fp32"


def test_a_learning_rate_given_twice_is_refused_with_both():
    ds = ds_json(optimizer={"type": "AdamW", "params": {"lr": 0.003}})
    has(only(ds_refusals(ds)), "given twice", "optimizer.params.lr 0.003", "warmup_max_lr 0.002", "leave")
    assert ds_refusals(ds_json(optimizer={"type": "AdamW", "params": {"lr": 0.002}})) == []


def test_a_missing_optimizer_or_scheduler_is_refused_with_what_to_add():
    has(only(ds_refusals(ds_json(optimizer=...))), '"optimizer"', "missing", "AdamW")
    has(only(ds_refusals(ds_json(scheduler=...))), '"scheduler"', "WarmupDecayLR")
    other = ds_json(scheduler={"type": "WarmupLR", "params": {}})
    has(only(ds_refusals(other)), '"scheduler"', "'WarmupLR'", "WarmupDecayLR")


def test_an_optimizer_without_a_type_is_refused():
    has(only(ds_refusals(ds_json(optimizer={"params": {}}))), "optimizer", "type")


def test_a_schedule_without_its_type_is_told_to_say_linear():
    has(only(ds_refusals(with_schedule(warmup_type=...))), "scheduler.params", '"warmup_type"', "missing", "linear")
    has(only(ds_refusals(with_schedule(warmup_type="log"))), '"warmup_type"', '"log"', "linear")


@pytest.mark.parametrize("warmup", [100, 101])
def test_a_warm_up_not_below_the_total_is_refused_with_both(warmup):
    problem = only(ds_refusals(with_schedule(warmup_num_steps=warmup)))
    has(problem, f"warmup_num_steps is {warmup}", "total_num_steps 100", "lower it")
    assert ds_refusals(with_schedule(warmup_num_steps=99)) == []
    assert ds_refusals(with_schedule(warmup_num_steps=0)) == []


def test_all_problems_of_a_deepspeed_json_come_at_once():
    ds = ds_json(
        zero_optimization={"stage": 3},
        fp16={"enabled": True},
        train_batch_size=7,
        scheduler={"type": "WarmupDecayLR", "params": {**SCHEDULE, "warmup_num_steps": 200}},
        optimizer=...,
    )
    problems = ds_refusals(ds)
    assert len(problems) == 5
    has(" ".join(problems), "stage is 3", "precision", "is 7", "warmup_num_steps is 200", '"optimizer"')


def test_an_unknown_key_does_not_hide_the_other_problems():
    problems = ds_refusals(ds_json(zero_optimization={"stage": 3, "overlap_com": 1}, gradient_cliping=1))
    assert len(problems) == 3, problems


def test_a_section_of_the_wrong_kind_does_not_hide_the_unknown_keys():
    problems = ds_refusals({"gradient_cliping": 1, **ds_json(bf16=True)})
    assert len(problems) == 2, problems


# --- batch sizes: total = micro-batch x accumulation x ranks ---


@pytest.mark.parametrize(
    ("total", "micro", "accumulation", "world_size", "expected"),
    [
        (None, 2, None, 4, (2, 1)),
        (None, 2, 3, 4, (2, 3)),
        (24, None, None, 4, (6, 1)),
        (24, None, 3, 4, (2, 3)),
        (24, 2, None, 4, (2, 3)),
        (24, 2, 3, 4, (2, 3)),
        (1, 1, 1, 1, (1, 1)),
    ],
)
def test_batch_sizes_are_completed_by_deepspeeds_rules(total, micro, accumulation, world_size, expected):
    assert batch_sizes(batch_keys(total, micro, accumulation), world_size) == expected


@pytest.mark.parametrize(
    ("total", "micro", "accumulation", "world_size", "numbers"),
    [
        (25, 2, 3, 4, ("25", "2 per rank", "3 accumulation", "4 ranks", "24")),
        (25, 2, None, 4, ("25", "2 per rank", "3 accumulation", "4 ranks", "24")),
        (25, None, 3, 4, ("25", "2 per rank", "3 accumulation", "4 ranks", "24")),
        (3, None, None, 4, ("3", "1 per rank", "4 ranks", "is 4")),
        (3, 2, None, 4, ("3", "2 per rank", "4 ranks", "is 8")),
    ],
)
def test_batch_sizes_that_disagree_are_refused_with_the_numbers(total, micro, accumulation, world_size, numbers):
    ds = ds_json(**batch_keys(total, micro or ..., accumulation or ...))
    has(only(ds_refusals(ds, world_size)), "ds.json", '"train_batch_size"', *numbers, "change one")


def batch_keys(total, micro, accumulation):
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {key: value for key, value in zip(keys, (total, micro, accumulation), strict=True) if value is not None}


def deepspeeds_answer(sizes, world_size):
    config = object.__new__(DeepSpeedConfig)
    config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps = sizes
    config.world_size = world_size
    try:
        config._configure_train_batch_size()
    except AssertionError:
        return None
    return config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps


def test_batch_sizes_agree_with_deepspeed_for_every_small_choice():
    choices = (None, 1, 2, 3, 4, 6, 12)
    for *sizes, world_size in itertools.product(choices, choices, choices, (1, 2, 3)):
        try:
            ours = batch_sizes(batch_keys(*sizes), world_size)
        except UserError:
            ours = None
        assert ours == deepspeeds_answer(sizes, world_size), (sizes, world_size)


def test_a_missing_or_impossible_batch_size_is_refused():
    has(only(ds_refusals(ds_json(train_micro_batch_size_per_gpu=...))), "train_micro_batch_size_per_gpu", "add")
    for value in (0, -1, 1.5, "2", True):
        problem = only(ds_refusals(ds_json(train_micro_batch_size_per_gpu=value)))
        has(problem, "train_micro_batch_size_per_gpu", json.dumps(value), "at least 1")


# --- between the three ---


def between(world_size=1, experts=4, ds=None, **options):
    run = RunConfig(ds_config="ds.json", preset="mine", **options)
    return sentences(run_problems(run, ModelConfig(**shape(num_local_experts=experts)), ds or ds_json(), world_size))


def test_ep_size_must_divide_ranks_and_experts():
    for world_size, experts, ep_size in itertools.product(range(1, 9), (4, 6), range(1, 9)):
        problems = between(world_size, experts, ep_size=ep_size)
        assert len(problems) == (world_size % ep_size > 0) + (experts % ep_size > 0)
    has(only(between(3, ep_size=2)), "ep_size is 2", "3 ranks", "divisor")
    has(only(between(3, ep_size=3)), "ep_size is 3", "4 experts", "mine", "divisor")


def test_steps_beyond_the_schedule_are_refused():
    has(only(between(steps=101)), "steps is 101", "ds.json", "100", "lower --steps", "total_num_steps")
    assert between(steps=100) == between() == []


def test_all_problems_between_the_three_come_at_once():
    assert len(between(world_size=4, experts=4, ep_size=3, steps=101)) == 3
