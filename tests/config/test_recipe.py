"""The DeepSpeed JSON and what fits between it and the other owners."""

import copy
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from refusals import has, only, sentences
from toy import PRESET

from megamoe.config.model import ModelConfig
from megamoe.config.recipe import DTYPES, batch_sizes, deepspeed_problems, dtype_of
from megamoe.config.run import RunConfig
from megamoe.config.run_checks import length_problems, run_problems
from megamoe.config.schedule import Schedule, read_schedule
from megamoe.model.placement import placement_problems
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import read_json

SHIPPED = {path.stem: path for path in (Path(__file__).parents[2] / "ds_configs").glob("*.json")}
SCHEDULE = {"warmup_type": "linear", "warmup_max_lr": 0.002, "warmup_num_steps": 10, "total_num_steps": 100}
PLAIN = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {}},
    "scheduler": {"type": "WarmupDecayLR", "params": SCHEDULE},
}
LINEAR = {"warmup_type": "linear", "warmup_num_steps": 10}
CONSTANT = {"scheduler": {"type": "WarmupLR", "params": {**LINEAR, "warmup_max_lr": 0.002}}}
STABLE = {"scheduler": {"type": "WarmupStableDecayLR", "params": {**SCHEDULE, "decay_num_steps": 20}}}
COSINE = {
    "scheduler": {"type": "WarmupCosineLR", "params": {**LINEAR, "total_num_steps": 100}},
    "optimizer.params.lr": 2e-3,
}


def ds_json(changes=None):
    """A JSON without a problem, with values at "section.key" changed, or removed for `...`."""
    ds = copy.deepcopy(PLAIN)
    for way, value in (changes or {}).items():
        *sections, key = way.split(".")
        place = ds
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = copy.deepcopy(value)
        if value is ...:
            del place[key]
    return ds


def problems_of(changes, world_size=1, on_cpu=True):
    return sentences(deepspeed_problems(ds_json(changes), "ds.json", world_size, on_cpu))


# --- what is shipped ---


def test_every_shipped_deepspeed_json_has_no_problem():
    for path, world_size, on_cpu in itertools.product(SHIPPED.values(), (1, 2, 8), (True, False)):
        assert deepspeed_problems(read_json(path), str(path), world_size, on_cpu) == []


def test_the_documented_recipes_are_shipped_and_zero2_is_the_original_one():
    ds = read_json(SHIPPED["zero2"])
    assert ds["zero_optimization"]["stage"] == 2
    assert ds["bf16"]["enabled"] == "auto"
    assert ds["gradient_clipping"] == 1.0
    assert ds["optimizer"]["type"] == "AdamW"
    assert ds["optimizer"]["params"].items() >= {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01}.items()
    assert ds["data_types"]["grad_accum_dtype"] == "fp32"
    assert batch_sizes(ds, 8) == (2, 1)
    assert read_schedule(ds, "zero2.json") == Schedule(1.5e-3, 1000, 0.0, "linear", 9000, 10_000, 0.0)
    assert read_json(SHIPPED["zero1"])["zero_optimization"]["stage"] == 1
    assert dtype_of(read_json(SHIPPED["zero2_fp32"])) == "fp32"
    assert read_json(SHIPPED["zero2_offload"])["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


# --- one sentence each ---


def test_an_unknown_key_of_any_section_names_the_nearest():
    for wrong, right in {
        "zero_optimisation": "zero_optimization",
        "zero_optimization.overlap_com": "overlap_comm",
        "zero_optimization.offload_optimizer.devise": "device",
        "optimizer.parms": "params",
        "optimizer.params.weight_deacy": "weight_decay",
        "scheduler.tipe": "type",
        "scheduler.params.warmup_maxlr": "warmup_max_lr",
        "bf16.enabeld": "enabled",
        "fp16.loss_scaling": "loss_scale",
        "data_types.grad_acum_dtype": "grad_accum_dtype",
        "timers.throughputs": "throughput",
    }.items():
        section, _, key = wrong.rpartition(".")
        has(only(problems_of({wrong: 1})), "ds.json", section, f'"{key}"', f'did you mean "{right}"?')


def test_a_section_that_is_no_object_is_refused():
    sections = ("bf16", "fp16", "zero_optimization", "optimizer", "scheduler", "data_types")
    for section, value in [
        *((section, True) for section in sections),
        *itertools.product(("optimizer.params", "scheduler.params"), (None, [1])),
    ]:
        has(only(problems_of({section: value})), "ds.json", section, json.dumps(value), "object")


MIXED = {"zero_optimization.stage": 1, "data_types.grad_accum_dtype": "fp32"}
FP16 = {"bf16": ..., "fp16.enabled": True}
REFUSED = [
    ({"optimizer.params.eps": "1e-8"}, ['eps is "1e-8"', "in quotes", "a number of at least 0"]),
    ({"optimizer.params.weight_decay": True}, ["weight_decay is true", "a number", "leave it out"]),
    ({"optimizer.params.betas": [True, 0.9]}, ["betas", "two numbers"]),
    ({"optimizer.params.betas": [0.9, 1]}, ["betas", "to below 1"]),
    ({"optimizer.params.fused": "true"}, ['fused is "true"', "in quotes", "true or false"]),
    ({"optimizer.params.amsgrad": True}, ["amsgrad is true", "leave it out"]),
    ({"optimizer.params.lr": 0.003}, ["given twice", "optimizer.params.lr 0.003", "warmup_max_lr 0.002", "leave"]),
    ({"optimizer.type": ...}, ["optimizer.type", "missing"]),
    ({"optimizer": ...}, ['"optimizer"', "missing", "AdamW"]),
    ({"scheduler": ...}, ['"scheduler"', "WarmupDecayLR"]),
    (
        {"scheduler.type": "OneCycle"},
        ['"scheduler"', '"OneCycle"', "WarmupDecayLR", "WarmupCosineLR", "WarmupStableDecayLR", "WarmupLR"],
    ),
    ({"scheduler.type": ["WarmupLR"]}, ['"scheduler"', '["WarmupLR"]']),
    ({"scheduler.params.warmup_max_lr": "2e-3"}, ['"warmup_max_lr" is "2e-3"', "number"]),
    ({"scheduler.params.warmup_num_steps": True}, ['"warmup_num_steps" is true', "integer"]),
    ({"scheduler.params.warmup_type": ...}, ["scheduler.params", '"warmup_type"', "missing", "linear"]),
    ({"scheduler.params.warmup_type": "log"}, ['"warmup_type"', '"log"', "linear"]),
    ({"scheduler.params.warmup_num_steps": 100}, ["warmup_num_steps is 100", "total_num_steps 100", "lower it"]),
    (
        {**STABLE, "scheduler.params.decay_num_steps": 91},
        ["scheduler.params", "decay_num_steps is 91", "warmup_num_steps 10 leaves 90 of total_num_steps 100"],
    ),
    ({**CONSTANT, "scheduler.params.total_num_steps": 9}, ["scheduler.params", "unknown key", '"total_num_steps"']),
    ({**STABLE, "scheduler.params.cos_min_ratio": 1}, ["scheduler.params", "unknown key", '"cos_min_ratio"']),
    ({**COSINE, "scheduler.params.warmup_max_lr": 2e-3}, ["no warmup_max_lr; give optimizer.params.lr"]),
    ({**COSINE, "scheduler.params.warmup_min_lr": 0.0}, ["no warmup_min_lr; give", "warmup_min_ratio"]),
    ({**COSINE, "optimizer.params.lr": 0}, ["optimizer.params.lr is 0", "WarmupCosineLR", "above 0"]),
    ({**COSINE, "optimizer.params.lr": "auto"}, ['optimizer.params.lr is "auto"', "Trainer"]),
    ({**COSINE, "optimizer.params.lr": ...}, ["optimizer.params.lr is null", "WarmupCosineLR"]),
    ({"zero_optimization.stage": 3}, ["stage is 3", "MoE", "1 or 2"]),
    ({"zero_optimization": ...}, ["stage is 0", "1 or 2"]),
    ({"zero_optimization.stage": True}, ["stage is true", "1 or 2"]),
    ({"zero_optimization.contiguous_gradients": False}, ["contiguous_gradients is false", "set it to true"]),
    ({"zero_optimization.reduce_scatter": False}, ["reduce_scatter is false", "set it to true"]),
    ({"zero_optimization.round_robin_gradients": True}, ["round_robin_gradients is true", "leave it out"]),
    ({"zero_optimization.elastic_checkpoint": True}, ["elastic_checkpoint is true", "leave it out"]),
    ({"zero_optimization.reduce_bucket_size": 0.5}, ["reduce_bucket_size is 0.5", "whole number"]),
    ({"zero_optimization.overlap_comm": 1}, ["overlap_comm is 1", "true or false"]),
    (MIXED, ["stage is 1 with bf16", "use stage 2"]),
    (FP16, ["fp16 on CPU", "null", "above 0", "bf16"]),
    ({**FP16, "fp16.loss_scale": 0.0}, ["fp16 on CPU", "0.0", "above 0"]),
    ({**FP16, "fp16.loss_scale": -1}, ["fp16 on CPU", "-1", "above 0"]),
    ({"fp16.loss_scale": "auto"}, ['loss_scale is "auto"', "Trainer"]),
    ({"fp16.hysteresis": [2]}, ["hysteresis is [2]", "whole number"]),
    ({"fp16": {"enabled": True, "loss_scale": 128}}, ["given twice", "bf16", "fp16", "disable one"]),
    ({"gradient_clipping": "1.0"}, ['gradient_clipping is "1.0"', "in quotes", "norm"]),
    ({"steps_per_print": 0}, ["steps_per_print is 0", "at least 1"]),
    ({"communication_data_type": 16}, ["communication_data_type is 16", "a text"]),
    ({"timers": {"throughput": {"enabled": 1}}}, ["timers.throughput.enabled is 1", "true"]),
    ({"comms_logger": {"enabled": True}}, ['"comms_logger"', "tools/plan.py", "leave it out"]),
    ({"activation_checkpointing": {"x": True}}, ['"activation_checkpointing"', "--recompute_blocks", "leave it out"]),
    ({"train_micro_batch_size_per_gpu": ...}, ['add "train_micro_batch_size_per_gpu"']),
    *(
        ({"train_micro_batch_size_per_gpu": value}, ["train_micro_batch_size_per_gpu", json.dumps(value), "at least 1"])
        for value in (0, True)
    ),
]


@pytest.mark.parametrize(("changes", "parts"), REFUSED, ids=lambda one: str(one)[:60] if isinstance(one, dict) else "")
def test_a_value_that_cannot_be_run_is_a_sentence_with_what_to_give(changes, parts):
    has(only(problems_of(changes)), "ds.json", *parts)


def test_deepspeeds_monitors_are_refused_with_where_the_losses_are():
    for name in ("tensorboard", "wandb", "comet", "csv_monitor"):
        for section in ({"enabled": True, "project": "x"}, {}, None, "auto"):
            has(only(problems_of({name: section})), f'"{name}"', "tensorboard/", "log.jsonl", "leave it out")
        assert problems_of({name: {"enabled": False}}) == []


def test_what_can_be_run_has_no_problem():
    for changes in (
        {},
        CONSTANT,
        STABLE,
        {**STABLE, "scheduler.params.decay_num_steps": 90},
        COSINE,
        {"scheduler.params.warmup_num_steps": 99},
        {"scheduler.params.warmup_num_steps": 0},
        {"optimizer.params.lr": 0.002},
        {**MIXED, "data_types": ...},
        {**MIXED, "zero_optimization.stage": 2},
        {"zero_optimization": {"stage": 1, "contiguous_gradients": False, "reduce_scatter": False}},
        {**FP16, "fp16.loss_scale": 128},
        {"fp16.enabled": False},
        {"timers": {"throughput": {"enabled": True, "synchronized": False}}},
    ):
        assert problems_of(changes) == [], changes
    assert problems_of(FP16, on_cpu=False) == []
    assert read_schedule(ds_json(COSINE), "ds.json").peak == 2e-3


def test_whole_numbers_may_be_written_as_5e8():
    steps = {"scheduler.params.total_num_steps": 1e4, "scheduler.params.warmup_num_steps": 1e3}
    changes = {**steps, "zero_optimization.reduce_bucket_size": 5e8, "zero_optimization.allgather_bucket_size": 5e8}
    assert problems_of(changes) == []
    assert read_schedule(ds_json(changes), "ds.json").total_steps == 10_000


def test_the_precision_is_that_of_the_enabled_section_and_given_once_on_any_device():
    assert dtype_of({"bf16": {"enabled": True}}) == "bf16"
    assert dtype_of({"fp16": {"enabled": True}, "bf16": {"enabled": False}}) == "fp16"
    assert dtype_of({"fp16": {}}) == dtype_of({}) == "fp32"
    has(only(problems_of({"fp16.enabled": True}, on_cpu=False)), "given twice")
    has(only(problems_of({"fp16": {"enabled": "auto", "loss_scale": 0}}, on_cpu=False)), "fp16.enabled", '"auto"')


# --- all at once ---

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


def test_every_auto_of_hugging_faces_trainer_is_a_sentence_together_with_all_others():
    for on_cpu in (True, False):
        problems = sentences(deepspeed_problems(HUGGING_FACE, "ds.json", 1, on_cpu))
        for name in AUTOS:
            found = [text for text in problems if re.search(rf'[".]{name}"? is "auto"|: {name} is "auto"', text)]
            assert len(found) == 1, name
        assert len(problems) == len(AUTOS) + on_cpu  # and fp16 on CPU without a loss scale
    has(next(text for text in problems if ".eps" in text), "Hugging Face's Trainer", "a number of at least 0")


def test_all_problems_of_a_deepspeed_json_come_at_once():
    problems = problems_of(
        {
            "gradient_cliping": 1, "zero_optimization": {"stage": 3, "overlap_com": 1}, "bf16": True,
            "train_batch_size": 7, "scheduler.params.warmup_num_steps": 200, "optimizer": ...,
        }
    )  # fmt: skip
    assert len(problems) == 7, problems
    has(" ".join(problems), "cliping", "overlap_com", '"bf16"', "stage is 3", "is 7", "is 200", '"optimizer"')


# --- batch sizes: total = micro-batch x accumulation x ranks ---

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@pytest.mark.parametrize(
    ("sizes", "numbers"),
    [
        ((25, 2, None), ("25", "2 per rank", "3 accumulation", "4 ranks", "24")),
        ((3, None, None), ("3", "1 per rank", "4 ranks", "is 4")),
    ],
)
def test_batch_sizes_that_disagree_are_refused_with_the_numbers(sizes, numbers):
    changes = {key: ... if size is None else size for key, size in zip(BATCH_KEYS, sizes, strict=True)}
    has(only(problems_of(changes, 4)), "ds.json", '"train_batch_size"', *numbers, "change one")


def deepspeeds_answer(sizes, world_size):
    from deepspeed.runtime.config import DeepSpeedConfig

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
        given = {key: size for key, size in zip(BATCH_KEYS, sizes, strict=True) if size is not None}
        try:
            ours = batch_sizes(given, world_size)
        except UserError:
            ours = None
        assert ours == deepspeeds_answer(sizes, world_size), (sizes, world_size)


# --- between the three ---


def between(world_size=1, experts=4, ds=None, widths=(32, 48), **options):
    run = RunConfig(ds_config="ds.json", preset="mine", **options)
    sizes = {"num_local_experts": experts, "hidden_size": widths[0], "intermediate_size": widths[1]}
    model = ModelConfig(**{**PRESET, **sizes})
    problems = placement_problems(model, run.ep_size, dtype_of(ds_json(ds)), world_size, run.preset)
    problems += run_problems(run, model, ds_json(ds), world_size) + length_problems(run, ds_json(ds))
    return sentences(problems)


FOUR = {"gradient_accumulation_steps": 4}
UNCHECKED = {"bf16.check_grad_overflow": False}
MISFITS = [
    ({"world_size": 3, "ep_size": 2}, ["ep_size is 2", "3 ranks", "divisor"]),
    ({"world_size": 3, "ep_size": 3}, ["ep_size is 3", "4 experts", "mine", "divisor"]),
    ({"seq_len": 17}, ["seq_len is 17", "max_position_embeddings 16", "lower it"]),
    ({"steps": 101}, ["steps is 101", "ds.json", "100", "lower --steps", "total_num_steps"]),
    ({"ds": CONSTANT}, ["the schedule in ds.json has no end", "--steps"]),
    ({"ds": FOUR, "batch_ramp": ["4:5", "6:9"]}, ["6 samples", "2 per rank x 2 ranks is 4", "multiple of 4"]),
    ({"ds": FOUR, "batch_ramp": ["4:5", "4:9"]}, ["4 samples up to step 5, then 4 up to step 9", "rise"]),
    ({"ds": FOUR, "batch_ramp": ["4:5", "8:5"]}, ["4 samples up to step 5, then 8 up to step 5", "rise"]),
    ({"ds": FOUR, "batch_ramp": ["4:5", "16:9"]}, ["ends with 16", "ds.json is 16", "give fewer"]),
    ({"ds": UNCHECKED, "guard": "act"}, ['guard is "act"', '"check_grad_overflow"', "ds.json", "set it to true"]),
    ({"recompute_blocks": 3}, ["recompute_blocks is 3", "mine has 2 blocks", "at most"]),
]


@pytest.mark.parametrize(("options", "parts"), MISFITS, ids=lambda one: str(one)[:60] if isinstance(one, dict) else "")
def test_what_does_not_fit_between_the_three_owners_is_refused(options, parts):
    if "batch_ramp" in options:
        options = {**options, "world_size": 2}
        parts = ["batch_ramp", *parts]
    has(only(between(**options)), *parts)


def test_what_fits_between_the_three_owners_has_no_problem_and_all_problems_come_at_once():
    for options in (
        {"seq_len": 16},
        {"steps": 100},
        {"ds": CONSTANT, "steps": 10**6},
        {"world_size": 2, "ds": FOUR, "batch_ramp": ["4:5", "8:9"]},
        {"ds": UNCHECKED},
        {"guard": "act"},
        {"recompute_blocks": 2},
    ):
        assert between(**options) == [], options
    assert len(between(world_size=4, experts=4, ep_size=3, steps=101)) == 3


def test_ep_size_must_divide_ranks_and_experts():
    for world_size, experts, ep_size in itertools.product(range(1, 9), (4, 6), range(1, 9)):
        problems = between(world_size, experts, ep_size=ep_size)
        assert len(problems) == (world_size % ep_size > 0) + (experts % ep_size > 0)


def product_is_possible(dtype, hidden, inside):
    weight = torch.ones(2, inside, hidden, dtype=dtype, requires_grad=True)
    rows, ends = torch.ones(6, hidden, dtype=dtype), torch.tensor([4, 6], dtype=torch.int32)
    try:
        torch.nn.functional.grouped_mm(rows, weight.transpose(-2, -1), offs=ends).exp().sum().backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(("dtype", "multiple"), [("bf16", 8), ("fp16", 8), ("fp32", 4)])
def test_widths_that_the_experts_products_cannot_have_are_refused(dtype, multiple):
    ds = {"bf16": ..., dtype: {"enabled": True}} if dtype != "bf16" else {}
    for widths in ((32, 48), (36, 48), (32, 44), (34, 48), (32, 50), (33, 49)):
        names = ("hidden_size", "intermediate_size")
        wrong = [(name, width) for name, width in zip(names, widths, strict=True) if width % multiple]
        for problem, (name, width) in zip(between(ds=ds, widths=widths), wrong, strict=True):
            has(problem, f"{name} is {width} in mine", dtype, "multiple of 16 bytes", f"a multiple of {multiple}.")
        assert product_is_possible(DTYPES[dtype], *widths) == (not wrong)
