"""The DeepSpeed JSON and what fits between it and the other owners."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from refusals import has, only, sentences
from toy import PRESET

from megamoe.config import ModelConfig
from megamoe.ds_config import DTYPES, batch_sizes, deepspeed_problems, dtype_of, length_problems, run_problems
from megamoe.errors import UserError
from megamoe.json_files import read_json
from megamoe.run_config import RunConfig
from megamoe.schedule_config import Schedule, read_schedule

DS_CONFIGS = sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json"))
SCHEDULE = {"warmup_type": "linear", "warmup_max_lr": 0.002, "warmup_num_steps": 10, "total_num_steps": 100}


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


def ds_refusals(ds, world_size=1, on_cpu=True):
    return sentences(deepspeed_problems(ds, "ds.json", world_size, on_cpu))


# --- what is shipped ---


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
    assert read_schedule(ds, "zero2.json") == Schedule(1.5e-3, 1000, 0.0, "linear", 9000, 10_000, 0.0)


# --- one section after the other ---


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
        ("timers", "throughputs", "throughput"),
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
    ],
    ids=["optimizer.params", "offload_optimizer"],
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


HUGGING_FACE = {  # as its Trainer's documentation has it
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
             "min_loss_scale": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {
        "warmup_type": "linear", "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
        "total_num_steps": "auto"}},
    "zero_optimization": {"stage": 2, "allgather_partitions": True, "allgather_bucket_size": 2e8, "overlap_comm": True,
                          "reduce_scatter": True, "reduce_bucket_size": "auto", "contiguous_gradients": True},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip
AUTOS = (
    "enabled", "lr", "betas", "eps", "weight_decay", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps",
    "total_num_steps", "reduce_bucket_size", "gradient_clipping", "gradient_accumulation_steps", "train_batch_size",
    "train_micro_batch_size_per_gpu",
)  # fmt: skip


@pytest.mark.parametrize("on_cpu", [True, False])
def test_every_auto_of_hugging_faces_trainer_is_a_sentence_together_with_all_others(on_cpu):
    problems = ds_refusals(HUGGING_FACE, on_cpu=on_cpu)
    for name in AUTOS:
        assert sum(bool(re.search(rf'[".]{name}"? is "auto"|: {name} is "auto"', text)) for text in problems) == 1, name
    assert len(problems) == len(AUTOS) + on_cpu  # and fp16 on CPU without a loss scale
    has(next(problem for problem in problems if ".eps" in problem), "Hugging Face's Trainer", "a number of at least 0")


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("optimizer.params", "eps", "1e-8", ['"1e-8"', "in quotes", "a number of at least 0"]),
        ("optimizer.params", "weight_decay", True, ["true", "a number"]),
        ("optimizer.params", "weight_decay", None, ["null", "leave it out"]),
        ("optimizer.params", "lr", "0.002", ['"0.002"', "in quotes"]),
        ("optimizer.params", "betas", [True, 0.9], ["two numbers"]),
        ("optimizer.params", "fused", "true", ['"true"', "in quotes", "true or false"]),
        ("scheduler.params", "warmup_max_lr", "2e-3", ['"2e-3"', "number"]),
        ("scheduler.params", "total_num_steps", "100", ['"100"', "integer"]),
        ("scheduler.params", "warmup_num_steps", True, ["true", "integer"]),
        ("zero_optimization", "reduce_bucket_size", "5e8", ['"5e8"', "whole number"]),
        ("zero_optimization", "reduce_bucket_size", 0.5, ["0.5", "whole number"]),
        ("zero_optimization", "overlap_comm", 1, ["1", "true or false"]),
        ("zero_optimization", "stage", True, ["true", "1 or 2"]),
        ("fp16", "loss_scale", "auto", ['"auto"', "Trainer"]),
        ("fp16", "hysteresis", [2], ["[2]", "whole number"]),
        ("", "gradient_clipping", "1.0", ['"1.0"', "in quotes", "norm"]),
        ("", "steps_per_print", 0, ["0", "at least 1"]),
        ("", "communication_data_type", 16, ["16", "a text"]),
    ],
)
def test_a_value_of_the_wrong_kind_is_a_sentence_with_what_to_give(section, key, value, words):
    ds = json.loads(json.dumps(ds_json()))
    place = ds
    for name in filter(None, section.split(".")):
        place = place.setdefault(name, {})
    place[key] = value
    has(only(ds_refusals(ds)), key, *words)


def test_whole_numbers_may_be_written_as_5e8():
    ds = with_schedule(total_num_steps=1e4, warmup_num_steps=1e3)
    ds["zero_optimization"] = {"stage": 2, "reduce_bucket_size": 5e8, "allgather_bucket_size": 5e8}
    assert ds_refusals(ds) == []
    assert read_schedule(ds, "ds.json").total_steps == 10_000


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "comet", "csv_monitor"])
def test_deepspeeds_monitors_are_refused_with_where_the_losses_are(name):
    for section in ({"enabled": True, "project": "x"}, {}, None, "auto"):
        has(only(ds_refusals(ds_json(**{name: section}))), f'"{name}"', "tensorboard/", "log.jsonl", "leave it out")
    assert ds_refusals(ds_json(**{name: {"enabled": False}})) == []


def test_the_logger_of_collectives_and_checkpointed_activations_are_refused_with_what_to_use_instead():
    has(only(ds_refusals(ds_json(comms_logger={"enabled": True}))), '"comms_logger"', "tools/plan.py", "leave it out")
    activations = {"partition_activations": True, "number_checkpoints": None}
    problem = only(ds_refusals(ds_json(activation_checkpointing=activations)))
    has(problem, '"activation_checkpointing"', "--recompute_blocks", "leave it out")


@pytest.mark.parametrize("key", ["round_robin_gradients", "elastic_checkpoint"])
def test_what_would_make_checkpoints_unreadable_on_other_ranks_is_refused(key):
    has(only(ds_refusals(ds_json(zero_optimization={"stage": 2, key: True}))), f"{key} is true", "leave it out")


def test_the_optimizer_that_deepspeed_takes_for_zero_1_with_fp32_sums_of_bf16_gradients_is_refused():
    mixed = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    has(only(ds_refusals(ds_json(**mixed))), "stage is 1 with bf16", "use stage 2")
    assert ds_refusals(ds_json(**{**mixed, "data_types": {}})) == []
    assert ds_refusals(ds_json(**{**mixed, "zero_optimization": {"stage": 2}})) == []


def test_deepspeeds_own_timer_can_be_asked_for():
    assert ds_refusals(ds_json(timers={"throughput": {"enabled": True, "synchronized": False}})) == []
    has(only(ds_refusals(ds_json(timers={"throughput": {"enabled": 1}}))), "timers.throughput.enabled is 1", "true")


def test_a_third_moment_of_adam_is_refused():
    optimizer = {"type": "AdamW", "params": {"amsgrad": True}}
    has(only(ds_refusals(ds_json(optimizer=optimizer))), "amsgrad is true", "leave it out")


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


def test_an_auto_beside_the_other_precision_is_not_called_a_second_one():
    has(only(ds_refusals(ds_json(fp16={"enabled": "auto", "loss_scale": 0}), on_cpu=False)), "fp16.enabled", '"auto"')


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


@pytest.mark.parametrize("kind", ["OneCycle", None, ["WarmupLR"]])
def test_an_unknown_schedule_is_told_which_there_are(kind):
    names = ["WarmupDecayLR", "WarmupCosineLR", "WarmupStableDecayLR", "WarmupLR"]
    has(only(ds_refusals(ds_json(scheduler={"type": kind, "params": {}}))), '"scheduler"', json.dumps(kind), *names)


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


STABLE = {**SCHEDULE, "decay_num_steps": 20}
COSINE = {"warmup_type": "linear", "warmup_num_steps": 10, "total_num_steps": 100}


def cosine(params=COSINE, **optimizer_params):
    optimizer = {"type": "AdamW", "params": {"lr": 2e-3, **optimizer_params}}
    return ds_json(optimizer=optimizer, scheduler={"type": "WarmupCosineLR", "params": params})


def test_a_decay_that_begins_in_the_warm_up_is_refused_with_what_is_left():
    def stable(decay):
        params = {**STABLE, "decay_num_steps": decay}
        return ds_refusals(ds_json(scheduler={"type": "WarmupStableDecayLR", "params": params}))

    assert stable(20) == stable(90) == []
    has(
        only(stable(91)),
        "scheduler.params",
        "decay_num_steps is 91",
        "warmup_num_steps 10 leaves 90 of total_num_steps 100",
    )


def test_a_schedule_takes_the_keys_of_its_type_only():
    constant = {key: value for key, value in SCHEDULE.items() if key != "total_num_steps"}
    for kind, params, extra in (
        ("WarmupLR", constant, "total_num_steps"),
        ("WarmupDecayLR", SCHEDULE, "decay_num_steps"),
        ("WarmupStableDecayLR", STABLE, "cos_min_ratio"),
    ):
        assert ds_refusals(ds_json(scheduler={"type": kind, "params": params})) == []
        problem = only(ds_refusals(ds_json(scheduler={"type": kind, "params": {**params, extra: 1}})))
        has(problem, "scheduler.params", "unknown key", f'"{extra}"')


def test_the_peak_of_the_cosine_is_the_optimizers_rate_and_has_no_second_place():
    assert ds_refusals(cosine()) == []
    assert read_schedule(cosine(), "ds.json").peak == 2e-3
    twice = ds_refusals(cosine({**COSINE, "warmup_max_lr": 2e-3, "warmup_min_lr": 0.0}))
    assert len(twice) == 2
    has(" ".join(twice), "no warmup_max_lr; give optimizer.params.lr", "no warmup_min_lr; give", "warmup_min_ratio")
    for lr in (0, 0.0):
        has(only(ds_refusals(cosine(lr=lr))), f"optimizer.params.lr is {lr}", "WarmupCosineLR", "above 0")
    has(only(ds_refusals(cosine(lr="auto"))), 'optimizer.params.lr is "auto"', "Trainer")
    missing = ds_json(scheduler={"type": "WarmupCosineLR", "params": COSINE})
    has(only(ds_refusals(missing)), "optimizer.params.lr is null", "WarmupCosineLR")


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


def between(world_size=1, experts=4, ds=None, widths=(32, 48), **options):
    run = RunConfig(ds_config="ds.json", preset="mine", **options)
    sizes = {"num_local_experts": experts, "hidden_size": widths[0], "intermediate_size": widths[1]}
    problems = run_problems(run, ModelConfig(**{**PRESET, **sizes}), ds or ds_json(), world_size)
    return sentences(problems + length_problems(run, ds or ds_json()))


def test_ep_size_must_divide_ranks_and_experts():
    for world_size, experts, ep_size in itertools.product(range(1, 9), (4, 6), range(1, 9)):
        problems = between(world_size, experts, ep_size=ep_size)
        assert len(problems) == (world_size % ep_size > 0) + (experts % ep_size > 0)
    has(only(between(3, ep_size=2)), "ep_size is 2", "3 ranks", "divisor")
    has(only(between(3, ep_size=3)), "ep_size is 3", "4 experts", "mine", "divisor")


def test_sequences_longer_than_the_model_is_made_for_are_refused():
    has(only(between(seq_len=17)), "seq_len is 17", "max_position_embeddings 16", "lower it")
    assert between(seq_len=16) == []


def test_steps_beyond_the_schedule_are_refused():
    has(only(between(steps=101)), "steps is 101", "ds.json", "100", "lower --steps", "total_num_steps")
    assert between(steps=100) == between() == []


def test_a_schedule_without_an_end_needs_steps():
    constant = {key: value for key, value in SCHEDULE.items() if key != "total_num_steps"}
    ds = ds_json(scheduler={"type": "WarmupLR", "params": constant})
    has(only(between(ds=ds)), "the schedule in ds.json has no end", "--steps")
    assert between(ds=ds, steps=10**6) == []


@pytest.mark.parametrize(
    ("ramp", "words"),
    [
        (["4:5", "6:9"], ["6 samples", "2 per rank x 2 ranks is 4", "multiple of 4"]),
        (["4:5", "4:9"], ["4 samples up to step 5, then 4 up to step 9", "rise"]),
        (["4:5", "8:5"], ["4 samples up to step 5, then 8 up to step 5", "rise"]),
        (["4:5", "16:9"], ["ends with 16", "ds.json is 16", "give fewer"]),
    ],
)
def test_a_batch_ramp_that_does_not_lead_up_to_the_full_batch_on_these_ranks_is_refused(ramp, words):
    ds = ds_json(gradient_accumulation_steps=4)
    assert between(world_size=2, ds=ds, batch_ramp=["4:5", "8:9"]) == []
    has(only(between(world_size=2, ds=ds, batch_ramp=ramp)), "batch_ramp", *words)


def test_a_guard_that_acts_needs_deepspeed_to_look_for_overflows():
    unchecked = {**ds_json(), "bf16": {"enabled": True, "check_grad_overflow": False}}
    has(
        only(between(ds=unchecked, guard="act")), 'guard is "act"', '"check_grad_overflow"', "ds.json", "set it to true"
    )
    assert between(ds=unchecked) == between(guard="act") == []


def test_more_blocks_to_recompute_than_there_are_are_refused():
    has(only(between(recompute_blocks=3)), "recompute_blocks is 3", "mine has 2 blocks", "at most")
    assert between(recompute_blocks=2) == []


def test_all_problems_between_the_three_come_at_once():
    assert len(between(world_size=4, experts=4, ep_size=3, steps=101)) == 3


def product_is_possible(dtype, hidden, inside):
    weight = torch.ones(2, inside, hidden, dtype=dtype, requires_grad=True)
    rows, ends = torch.ones(6, hidden, dtype=dtype), torch.tensor([4, 6], dtype=torch.int32)
    try:
        torch.nn.functional.grouped_mm(rows, weight.transpose(-2, -1), offs=ends).exp().sum().backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("widths", [(32, 48), (36, 48), (32, 44), (34, 48), (32, 50), (33, 49)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_widths_that_the_experts_products_cannot_have_are_refused(dtype, widths):
    ds = ds_json(**{"bf16": ..., dtype: {"enabled": True}} if dtype != "bf16" else {})
    problems = between(ds=ds, widths=widths)
    multiple = 4 if dtype == "fp32" else 8
    names = ("hidden_size", "intermediate_size")
    wrong = [(name, width) for name, width in zip(names, widths, strict=True) if width % multiple]
    assert len(problems) == len(wrong)
    for problem, (name, width) in zip(problems, wrong, strict=True):
        has(problem, f"{name} is {width} in mine", dtype, "multiple of 16 bytes", f"a multiple of {multiple}.")
    assert product_is_possible(DTYPES[dtype], *widths) == (not wrong)
