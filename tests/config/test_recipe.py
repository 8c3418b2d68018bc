"""The DeepSpeed JSON: what is refused, what it is parsed to, and what must fit between it and the other owners."""

import copy
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from refusals import complaints, has, only, sentences
from toy import PRESET, SHIPPED

from megamoe.config.model import ModelConfig
from megamoe.config.recipe import DTYPES, batch_sizes, parse_recipe, read_recipe
from megamoe.config.recipe_sections import BatchSizes
from megamoe.config.run import RunConfig
from megamoe.config.run_checks import chosen_trackers, length_problems, run_problems
from megamoe.config.schedule import Schedule
from megamoe.model.placement import placement_problems
from megamoe.utils.errors import UserError

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


def parse(changes=None, ranks=1, on_cpu=True, auto="bf16"):
    return parse_recipe(ds_json(changes), "ds.json", ranks, on_cpu, auto)


def problems_of(changes, on_cpu=True):
    return complaints(parse_recipe, ds_json(changes), "ds.json", 1, on_cpu, "bf16")


# --- what is shipped ---


def test_every_shipped_deepspeed_json_is_parsed_and_zero2_is_the_original_recipe():
    for path, ranks, on_cpu in itertools.product(SHIPPED.glob("*.json"), (1, 2, 8), (True, False)):
        read_recipe(str(path), ranks, on_cpu, "bf16")
    recipe = read_recipe(str(SHIPPED / "zero2.json"), 8, False, "bf16")
    assert recipe.is_auto
    assert recipe.json["gradient_clipping"] == 1.0
    assert (
        recipe.json["optimizer"]["params"].items() >= {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01}.items()
    )
    assert (recipe.zero.stage, recipe.dtype, recipe.sum_dtype) == (2, "bf16", "fp32")
    assert (recipe.micro_batch, recipe.accumulation, recipe.samples) == (2, 1, 16)
    assert recipe.schedule == Schedule(1.5e-3, 1000, 0.0, "linear", 9000, 10_000, 0.0)
    assert read_recipe(str(SHIPPED / "zero2_offload.json"), 1, False, "bf16").zero.offloads_optimizer


# --- one sentence each: what the JSON has, and what the sentence names ---

FP16 = {"bf16": ..., "fp16.enabled": True}
UNKNOWN = {
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
}
NO_OBJECTS = [
    *itertools.product(("bf16", "fp16", "zero_optimization", "optimizer", "scheduler", "data_types"), (True,)),
    *itertools.product(("optimizer.params", "scheduler.params"), (None, [1])),
]
REFUSED = [
    *(({way: 1}, [way.rpartition(".")[0], f'"{way.split(".")[-1]}"', f'"{near}"?']) for way, near in UNKNOWN.items()),
    *(({way: value}, [way, json.dumps(value), "object"]) for way, value in NO_OBJECTS),
    ({"optimizer.params.eps": "1e-8"}, ['"eps" is "1e-8"', "in quotes", "number"]),
    ({"optimizer.params.betas": [0.9, 1]}, ["betas", "less than 1"]),
    ({"optimizer.params.betas": [0.9]}, ["betas", "2 items"]),
    ({"optimizer.params.fused": 1}, ['"fused" is 1', "boolean"]),
    ({"optimizer.params.amsgrad": True}, ['unknown key "amsgrad"']),
    ({"optimizer.params.lr": 0.003}, ["given twice", "optimizer.params.lr 0.003", "warmup_max_lr 0.002", "leave"]),
    ({"optimizer.type": ...}, ["optimizer.type", "missing"]),
    ({"optimizer": ...}, ['"optimizer"', "missing", "AdamW"]),
    ({"scheduler": ...}, ["scheduler", "WarmupDecayLR"]),
    ({"scheduler.type": "OneCycle"}, ["scheduler", '"OneCycle"', "WarmupCosineLR", "WarmupStableDecayLR", "WarmupLR"]),
    ({"scheduler.type": ["WarmupLR"]}, ["scheduler", '["WarmupLR"]']),
    ({"scheduler.params.warmup_type": ...}, ["scheduler.params", '"warmup_type"', "missing", "linear"]),
    ({"scheduler.params.warmup_type": "log"}, ['"warmup_type"', '"log"', "linear"]),
    ({"scheduler.params.warmup_num_steps": 100}, ["warmup_num_steps is 100", "total_num_steps 100", "lower it"]),
    ({**STABLE, "scheduler.params.decay_num_steps": 91}, ["decay_num_steps is 91", "10 leaves 90", "100"]),
    ({**CONSTANT, "scheduler.params.total_num_steps": 9}, ["scheduler.params", "unknown key", '"total_num_steps"']),
    ({**COSINE, "scheduler.params.warmup_max_lr": 2e-3}, ["warmup_max_lr", "0.002", "optimizer.params.lr", "move it"]),
    ({**COSINE, "scheduler.params.warmup_maxlr": 2e-3}, ['did you mean "warmup_max_lr"?']),
    ({**COSINE, "optimizer.params.lr": 0}, ["optimizer.params.lr is 0", "WarmupCosineLR", "above 0"]),
    ({**COSINE, "optimizer.params.lr": "auto"}, ['"lr" is "auto"', "Trainer"]),
    ({**COSINE, "optimizer.params.lr": ...}, ["optimizer.params.lr is null", "WarmupCosineLR"]),
    ({"zero_optimization.stage": 3}, ["stage", "3", "MoE", "1 or 2"]),
    ({"zero_optimization": ...}, ["stage", "0", "1 or 2"]),
    ({"zero_optimization.contiguous_gradients": False}, ["contiguous_gradients is false", "set it to true"]),
    ({"zero_optimization.reduce_scatter": False}, ["reduce_scatter is false", "set it to true"]),
    ({"zero_optimization.round_robin_gradients": True}, ["round_robin_gradients is true", "leave it out"]),
    ({"zero_optimization.cpu_offload": True}, ['unknown key "cpu_offload"', '"offload_optimizer"']),
    ({"zero_optimization.stage3_prefetch_bucket_size": 1}, ["stage3_prefetch", "no effect here, so leave it out"]),
    ({"aio": {"block_size": 1}}, ['unknown key "aio"', "it has no effect here, so leave it out"]),
    ({"zero_optimization.reduce_bucket_size": 0.5}, ['"reduce_bucket_size" is 0.5', "integer"]),
    ({"optimizer.type": "Lion", "zero_optimization.offload_optimizer": 5}, ["offload_optimizer", "5", "object"]),
    (FP16, ["fp16 on CPU", "null", "above 0", "bf16"]),
    ({**FP16, "fp16.loss_scale": 0.0}, ["fp16 on CPU", "0", "above 0"]),
    ({"fp16": {"enabled": True, "loss_scale": 128}}, ["given twice", "bf16", "fp16", "disable one"]),
    ({"fp16": {"enabled": True}, "bf16.enabled": "auto"}, ["given twice"]),
    ({"communication_data_type": "foo"}, ['communication_data_type" is "foo"', "bf16"]),
    (
        {"comms_logger": {"enabled": True, "verbose": True}},
        ["comms_logger", "verbose", "true", "table"],
    ),
    ({"comms_logger": {"prof_ops": ["reduce"]}}, ["comms_logger", "prof_ops", '["reduce"]', "leave it out"]),
    ({"activation_checkpointing": {"x": True}}, ['"activation_checkpointing"', "--recompute_blocks", "leave it out"]),
    *(({"comet": section}, ['"comet"', "wandb", "leave it out"]) for section in ({"enabled": True}, {}, None)),
    ({"wandb": {"projekt": "x"}}, ['"projekt"', '"project"?']),
    ({"tensorboard": {"enabled": True, "output_path": 1}}, ["tensorboard", '"output_path" is 1', "string"]),
    ({"train_micro_batch_size_per_gpu": ...}, ['add "train_micro_batch_size_per_gpu"']),
    ({"train_micro_batch_size_per_gpu": 0}, ["train_micro_batch_size_per_gpu", "0", "greater than or equal to 1"]),
    (
        {"train_batch_size": 3},
        ['"train_batch_size" is 3', "2 per rank x 1 accumulation x 1 ranks is 2"],
    ),
]


@pytest.mark.parametrize(("changes", "parts"), REFUSED, ids=lambda one: str(one)[:60] if isinstance(one, dict) else "")
def test_a_value_that_cannot_be_run_is_one_sentence_with_what_to_give(changes, parts):
    has(only(problems_of(changes)), "ds.json", *parts)


def test_what_can_be_run_has_no_problem():
    for changes in (
        CONSTANT,
        {**STABLE, "scheduler.params.decay_num_steps": 90},
        {"scheduler.params.warmup_num_steps": 0},
        {"optimizer.params.lr": 0.002},
        {"zero_optimization.stage": 1, "data_types.grad_accum_dtype": "fp32"},
        {"zero_optimization": {"stage": 1, "contiguous_gradients": False, "reduce_scatter": False}},
        {**FP16, "fp16.loss_scale": 128},
        {"comet": {"enabled": False}},
        {"wandb": {"enabled": True, "team": "us", "group": None, "project": "deepspeed"}},
        {"zero_optimization.reduce_bucket_size": 5e8, "scheduler.params.total_num_steps": 1e4},
    ):
        assert problems_of(changes) == [], changes
    assert problems_of(FP16, on_cpu=False) == []
    assert parse(COSINE).schedule.peak == 2e-3


def test_all_problems_of_a_deepspeed_json_come_at_once():
    problems = problems_of(
        {
            "gradient_cliping": 1, "zero_optimization": {"stage": 3, "overlap_com": 1}, "bf16": True,
            "train_batch_size": 7, "scheduler.params.warmup_num_steps": 200, "optimizer": ..., "comet": {},
        }
    )  # fmt: skip
    assert len(problems) == 8, problems


# --- variants ---


def test_a_precision_that_is_left_open_is_the_one_that_is_given_and_a_demanded_one_stays():
    for written, auto, dtype in (("auto", "fp32", "fp32"), ("auto", "bf16", "bf16"), (True, "fp32", "bf16")):
        recipe = parse({"bf16.enabled": written}, auto=auto)
        assert (recipe.dtype, recipe.json["bf16"]["enabled"]) == (dtype, dtype == "bf16")
        assert recipe.is_auto == (written == "auto")
        assert recipe.written["bf16"]["enabled"] == written


def test_a_replaced_value_is_in_the_fields_and_in_the_json_and_the_recipe_before_stays():
    before = parse({"bf16.enabled": "auto", "gradient_clipping": 1.0}, ranks=2, auto="fp32")
    after = before.replaced(
        {
            "train_micro_batch_size_per_gpu": 3, "zero_optimization.stage": 1, "fp16.hysteresis": 2,
            "gradient_clipping": None,
        }
    )  # fmt: skip
    assert (after.micro_batch, after.samples, after.dtype, after.is_auto) == (3, 6, "fp32", True)
    assert (after.zero.stage, after.json["fp16"]) == (1, {"hysteresis": 2})
    assert "gradient_clipping" not in after.json
    assert before == parse({"bf16.enabled": "auto", "gradient_clipping": 1.0}, ranks=2, auto="fp32")
    has(only(complaints(before.replaced, {"zero_optimization.stage": 3})), "ds.json", "stage")
    has(only(complaints(before.replaced, {"gradient_clipping.x": 3})), "gradient_clipping", "no section")


# --- batch sizes: total = micro-batch x accumulation x ranks ---


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
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    choices = (None, 1, 2, 3, 4, 6, 12)
    for *sizes, world_size in itertools.product(choices, choices, choices, (1, 2, 3)):
        given = BatchSizes(**dict(zip(keys, sizes, strict=True)))
        try:
            ours = batch_sizes(given, world_size, "ds.json")
        except UserError:
            ours = None
        assert ours == deepspeeds_answer(sizes, world_size), (sizes, world_size)


# --- between the three ---


def between(world_size=1, ds=None, widths=(32, 48), **options):
    run = RunConfig(ds_config="ds.json", preset="mine", **options)
    sizes = {"hidden_size": widths[0], "intermediate_size": widths[1]}
    model, recipe = ModelConfig(**{**PRESET, **sizes}), parse(ds, world_size, on_cpu=False)
    problems = placement_problems(model, run.ep_size, recipe.dtype, world_size, run.preset)
    problems += run_problems(run, model, recipe) + length_problems(run, recipe.schedule)
    return sentences(problems)


UNCHECKED = {"bf16.check_grad_overflow": False}
MISFITS = [
    ({"world_size": 3, "ep_size": 2}, ["ep_size is 2", "3 ranks", "divisor"]),
    ({"world_size": 3, "ep_size": 3}, ["ep_size is 3", "4 experts", "mine", "divisor"]),
    ({"seq_len": 17}, ["seq_len is 17", "max_position_embeddings 16", "lower it"]),
    ({"steps": 101}, ["steps is 101", "ds.json", "100", "lower --steps", "total_num_steps"]),
    ({"steps": 61, "schedule_steps": 60}, ["steps is 61", "by --schedule_steps", "60", "raise --schedule_steps"]),
    ({"ds": CONSTANT}, ["the schedule in ds.json has no end", "--steps"]),
    ({"ds": CONSTANT, "schedule_steps": 60}, ["schedule_steps is 60", "ds.json has no end", "--steps"]),
    ({"ds": UNCHECKED, "guard": "act"}, ['guard is "act"', '"check_grad_overflow"', "ds.json", "set it to true"]),
    ({"recompute_blocks": 3}, ["recompute_blocks is 3", "mine has 2 blocks", "at most"]),
    ({"recompute": "selective"}, ["recompute is 'selective'", "recompute_blocks is 0", "leave it out"]),
    (
        {"ds": {"csv_monitor.enabled": False}, "trackers": ["csv"]},
        ["trackers names csv", '"csv_monitor" in ds.json has "enabled": false', "keep one"],
    ),
]


@pytest.mark.parametrize(("options", "parts"), MISFITS, ids=lambda one: str(one)[:60] if isinstance(one, dict) else "")
def test_what_does_not_fit_between_the_three_owners_is_refused(options, parts):
    has(only(between(**options)), *parts)


def test_what_fits_between_the_three_owners_has_no_problem():
    for options in (
        {"seq_len": 16},
        {"steps": 100},
        {"ds": CONSTANT, "steps": 10**6},
        {"steps": 600, "schedule_steps": 600},
        {"ds": UNCHECKED},
        {"guard": "act"},
        {"recompute_blocks": 2},
    ):
        assert between(**options) == [], options


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
    ds = {"bf16.enabled": False, **({f"{dtype}.enabled": True} if dtype != "fp32" else {})}
    for widths in ((32, 48), (36, 48), (32, 44), (34, 48), (32, 50), (33, 49)):
        names = ("hidden_size", "intermediate_size")
        wrong = [(name, width) for name, width in zip(names, widths, strict=True) if width % multiple]
        for problem, (name, width) in zip(between(ds=ds, widths=widths), wrong, strict=True):
            has(problem, f"{name} is {width} in mine", dtype, "multiple of 16 bytes", f"a multiple of {multiple}.")
        assert product_is_possible(DTYPES[dtype], *widths) == (not wrong)


# --- trackers ---


def test_deepspeeds_sections_and_the_command_line_choose_the_same_trackers_and_deepspeed_gets_no_section():
    def chosen(changes=None, trackers=()):
        recipe = parse(changes)
        assert not recipe.json_for_deepspeed().keys() & {"tensorboard", "wandb", "csv_monitor"}
        return chosen_trackers(RunConfig(ds_config="ds.json", run_dir="runs/a", trackers=trackers), recipe)

    board = {"tensorboard": {"folder": Path("runs/a/tensorboard")}}
    wandb = {"project": "x", "group": None, "team": "us"}
    assert chosen() == chosen({"wandb.project": "x", "csv_monitor": {}, "tensorboard": {}}) == board
    assert chosen(trackers=["trackio", "csv"]) == {**board, "trackio": {}, "csv": {"folder": Path("runs/a/csv")}}
    assert chosen({"wandb": {"project": "x", "team": "us"}}, ["wandb"])["wandb"] == wandb
    assert chosen({"wandb": {"enabled": True, "project": "x", "team": "us"}}) == {**board, "wandb": wandb}
    off = {"tensorboard.enabled": False, "csv_monitor": {"enabled": True, "output_path": "logs"}}
    assert chosen(off) == {"csv": {"folder": Path("logs/a")}}
    assert chosen({**off, "csv_monitor.job_name": "b"}) == {"csv": {"folder": Path("logs/b")}}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_whose_package_is_missing_is_refused_even_where_a_folder_has_its_name(monkeypatch, tmp_path, name):
    assert between(trackers=[name]) == []
    (tmp_path / name).mkdir()
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    has(only(between(trackers=[name])), f"tracker {name}", "not installed", f"pip install 'megamoe[{name}]'")
