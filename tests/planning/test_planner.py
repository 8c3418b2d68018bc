import io
import itertools
import json
import re
from dataclasses import replace
from typing import get_args

import psutil
import pytest
import torch
from refusals import has, only, sentences
from rich.filesize import decimal
from toy import PRESET, SHIPPED, ds_config, shipped

from megamoe.__main__ import run as main
from megamoe.commands import plan as tool
from megamoe.config.model import load_preset
from megamoe.config.run import RunConfig, RunShape
from megamoe.planning import planner
from megamoe.planning.footprint import footprint
from megamoe.planning.options import PlanOptions
from megamoe.planning.planner import make_plan, rates_of, this_machine
from megamoe.planning.rates import CPU, GPU
from megamoe.planning.report import ADVICE, LIMITS, advice, assumptions
from megamoe.planning.step_time import Part, step_time
from megamoe.utils.errors import UserError
from megamoe.utils.text import size

ZERO2 = str(SHIPPED / "zero2.json")


def planned(**changes):
    values = {"gpus": 16, "ds_config": ZERO2, "ep_size": 8, **changes}
    run = {name: values.pop(name) for name in RunShape.model_fields if name in values}
    return make_plan(RunConfig(**run), PlanOptions(**values))


def one_line(out):
    """The text of tables without their lines, and what is wrapped in a row of two columns unwrapped."""
    return " ".join(re.sub("[\u2500-\u257f]", " ", out).split())


def test_a_micro_batch_of_the_command_line_stands_in_place_of_that_of_the_json(tmp_path):
    ds = {**shipped("zero2"), "train_batch_size": 256, "train_micro_batch_size_per_gpu": 16}
    del ds["gradient_accumulation_steps"]
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    setup = planned(gpus=128, ds_config=str(tmp_path / "ds.json"), micro_batch=2, seq_len=512).setup
    assert (setup.micro_batch, setup.accumulation, setup.seq_len) == (2, 1, 512)


def test_each_phase_of_a_data_schedule_is_planned_as_a_run_of_its_own(tmp_path):
    phases = [{"tokens": 3 * 16 * 1024, "samples_per_step": 16}, {"seq_len": 512, "micro_batch": 1}]
    (tmp_path / "phases.json").write_text(json.dumps({"phases": phases}))
    plan = planned(gpus=8, data_schedule=str(tmp_path / "phases.json"))
    first, second = tool.run_totals(plan)[1]
    assert (first[1], second[1]) == (3, plan.recipe.schedule.total_steps)
    alone = planned(gpus=8, seq_len=512, micro_batch=1, accumulation=second[0].accumulation)
    assert second[2].setup == alone.setup
    assert second[2].time.seconds == alone.time.seconds
    assert first[2].setup.accumulation * first[2].setup.micro_batch * 8 == 16
    (tmp_path / "phases.json").write_text(json.dumps({"phases": [{}, {"seq_len": 4096}]}))
    with pytest.raises(UserError, match="phase 1 has no tokens"):
        tool.run_totals(plan)


def test_all_problems_are_said_at_once(tmp_path, run):
    ds = ds_config(2, zero_optimization={"stage": 2, "reduce_bucket_size": 0})
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    options = ("--gpus", 10, "--ep_size", 3, "--device", "h1000", "--seq_len", 4096)
    code, out, problems = run("plan", *options, "--ds_config", tmp_path / "ds.json")
    assert (code, out) == (2, "")
    sentences(problems)
    for parts in (
        ("reduce_bucket_size is 0", "at least 1"),
        ("ep_size is 3", "10 ranks", "divisor"),
        ("ep_size is 3", "8 experts", "divisor"),
        ("seq_len is 4096", "1024", "lower it"),
        ("device is 'h1000'", "a100, h100, h200, b200, cpu"),
    ):
        assert [problem for problem in problems if all(part in problem for part in parts)], parts
    assert len(problems) == 5


def test_what_a_search_chooses_is_not_given(run):
    options = "--gpus 8 --best --ep_size 8 --micro_batch 2 --recompute_blocks 3 --recompute selective"
    code, out, problems = run("plan", "--ds_config", ZERO2, *options.split())
    assert (code, out) == (2, "")
    refused = ("--ep_size", "--recompute_blocks", "--recompute out", "--micro_batch")
    for problem, part in zip(sentences(problems), refused, strict=True):
        has(problem, part)


def test_the_json_has_what_is_printed(tmp_path, run):
    file = tmp_path / "plan.json"
    options = ("--gpus", 1024, "--ep_size", 8, "--ds_config", ZERO2, "--json", file, "--verbose")
    code, out, problems = run("plan", *options)
    out = one_line(out)
    assert (code, problems) == (0, [])
    record = json.loads(file.read_text())
    memory, time = record["predicted"]["memory"], record["predicted"]["time"]
    assert sum(memory["peak"].values()) == memory["totals"]["peak"]
    assert memory["totals"]["peak"] == planned(gpus=1024).footprint.peak.total()
    for kind in memory["peak"]:
        assert f" {kind} " in out
    for one in record["predicted"]["communication"]:
        assert f" {one['ranks']} {one['calls']} {size(one['payload'])} {size(one['sent_inside'])} " in out
    assert f"{time['tokens_per_second']:,.0f} tokens/s" in out
    for phase in time["phases"]:
        assert f" {phase['name']} " in out
    assert sum(phase["seconds"] for phase in time["phases"]) == pytest.approx(time["step"])
    assert f" limited by {LIMITS[time['limit']]} (" in out
    assert f" advice {time['advice']} " in out
    for sentence in record["assumptions"]:
        assert sentence in out
    assert f"; up to {record['predicted']['largest_micro_batch']} leave" in out
    assert f" checkpoint {decimal(record['predicted']['checkpoint_bytes'])}, " in out


def test_a_run_is_planned_with_its_hours_cost_and_epochs(run, inputs, tmp_path):
    config = {name: inputs[name] for name in ("preset", "ds_config")}
    plan = make_plan(RunConfig(**config), PlanOptions(gpus=2))
    given = [*itertools.chain(*((f"--{name}", value) for name, value in config.items())), "--gpus", 2]
    file = tmp_path / "plan.json"
    paid = ("--steps", 900, "--price_per_gpu_hour", 2.5, "--json", file, "--data", *inputs["data"])
    code, out, problems = run("plan", *given, *paid)
    assert (code, problems) == (0, [])
    total = json.loads(file.read_text())["predicted"]["run"]
    assert (total["steps"], total["tokens"]) == (900, 900 * 2 * 2 * 16)
    assert total["seconds"] == pytest.approx(900 * plan.time.seconds)
    assert total["gpu_hours"] == pytest.approx(2 * total["seconds"] / 3600)
    assert total["cost"] == pytest.approx(2.5 * total["gpu_hours"])
    samples = (6000 - 1) // 16  # of the corpus
    assert total["epochs"] == {inputs["data"][0]: pytest.approx(900 * 4 / samples)}
    has(one_line(out), "900 steps, 57,600 tokens", "9.63 epochs of", f"cost {total['cost']:.2f}")
    has(run("plan", *given, "--data", tmp_path / "none")[2][0], "there is no", "none.bin")


def test_a_run_without_an_end_is_planned_by_the_step(tmp_path, run):
    params = {"warmup_type": "linear", "warmup_max_lr": 1e-3, "warmup_num_steps": 10}
    ds = {**shipped("zero2"), "scheduler": {"type": "WarmupLR", "params": params}}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    code, out, problems = run("plan", "--gpus", 8, "--ds_config", tmp_path / "ds.json")
    assert (code, problems) == (0, [])
    has(one_line(out), "no end in", "give --steps", "tokens/s")
    assert "GPU-hours" not in out


@pytest.mark.parametrize(("encoding", "bar"), [("utf-8", "\u2501\u2501"), ("ascii", "--")])
def test_a_file_gets_at_most_100_columns_without_colours_and_what_its_encoding_has(encoding, bar, monkeypatch):
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding, write_through=True)
    monkeypatch.setattr("sys.stdout", file)
    main(["plan", "--gpus", "8", "--preset", "tiny", "--verbose", "--ds_config", str(SHIPPED / "zero2_offload.json")])
    lines = written.getvalue().decode(encoding).splitlines()
    assert max(map(len, lines)) == 100
    assert not [line for line in lines if "\x1b" in line or "?" in line]
    assert [line for line in lines if "weights" in line and bar in line]


def test_an_offloaded_optimizer_is_planned_in_the_hosts_memory(tmp_path, run):
    offload = str(SHIPPED / "zero2_offload.json")
    options = ("--gpus", 16, "--ep_size", 8, "--json", tmp_path / "plan.json")
    code, out, problems = run("plan", "--ds_config", offload, *options)
    assert (code, problems) == (0, [])
    on_device, on_host = planned(), planned(ds_config=offload)
    for kind in ("fp32 masters", "optimizer state"):
        assert on_host.footprint.host[kind] == on_device.footprint.peak[kind] > 0, kind
        assert kind not in on_host.footprint.peak, kind
    assert json.loads((tmp_path / "plan.json").read_text())["predicted"]["memory"]["host"] == dict(
        on_host.footprint.host
    )
    small = replace(on_host, device=replace(on_host.device, memory=on_host.footprint.peak.total()))
    assert small.fits
    assert not replace(small, device=replace(small.device, memory=small.device.memory - 1)).fits
    assert all(f" host: {kind} " in out for kind in on_host.footprint.host)
    out = one_line(run("plan", "--ds_config", offload, *options, "--verbose")[1])
    assert LIMITS["transfers"] in out
    assert "64 GB/s each way between device and host" in out


def test_a_larger_bucket_is_advised_where_it_lowers_the_peak(tmp_path, run):
    stack = 8 * 768 * 2048  # of experts, all of them on each rank
    plans = []
    for bucket in (stack - 1, stack):
        ds = shipped("zero2")
        ds["zero_optimization"]["reduce_bucket_size"] = bucket
        (tmp_path / "ds.json").write_text(json.dumps(ds))
        options = {"gpus": 8, "ep_size": 1, "micro_batch": 1, "recompute_blocks": 24}
        options["ds_config"] = str(tmp_path / "ds.json")
        plans.append(planned(**options))
        given = itertools.chain(*((f"--{name}", value) for name, value in options.items()))
        assert (f"set reduce_bucket_size to {stack}" in run("plan", *given)[1]) == (bucket < stack)
    small, large = plans
    assert small.larger_bucket == (stack, large.footprint.peak.total())
    assert large.footprint.peak.total() < small.footprint.peak.total()
    assert large.larger_bucket is None


def test_what_does_not_fit_is_said(run):
    assert planned().fits
    options = ("--gpus", 16, "--ep_size", 8, "--ds_config", ZERO2)
    assert "DOES NOT FIT" not in run("plan", *options)[1]
    assert not planned(micro_batch=200).fits
    assert "DOES NOT FIT in 79.6 GiB" in run("plan", *options, "--micro_batch", 200)[1]
    assert planned(micro_batch=100, device="h200").fits
    assert planned(micro_batch=64, imbalance=1).fits
    assert not planned(micro_batch=64, imbalance=2).fits
    assert planned().setup.imbalance > 1


def test_what_the_experts_gemms_are_is_said():
    for device, ds, kernel, said in (
        ("h100", "zero2", "grouped_mm", "torch.nn.functional.grouped_mm"),
        ("b200", "zero2", "grouped_mm_zeroed", "torch.nn.functional.grouped_mm"),
        ("a100", "zero2", "triton", "Triton"),
        ("h100", "zero2_fp32", "loop", "waits for the device in every layer"),
    ):
        plan = planned(device=device, ds_config=str(SHIPPED / f"{ds}.json"))
        assert plan.setup.kernel == kernel, (device, ds)
        has(only([sentence for sentence in assumptions(plan) if "experts' GEMMs" in sentence]), said)


def test_more_ranks_in_a_node_make_the_links_faster():
    apart, together = planned(gpus_per_node=4), planned(gpus_per_node=16)
    exchange = [plan.time.phases[0].device["exchange"] for plan in (apart, planned(), together)]
    assert exchange[0] > exchange[1] == exchange[2]
    assert apart.time.seconds > planned().time.seconds > together.time.seconds


def test_on_this_machine_all_ranks_share_its_memory_and_its_rate(monkeypatch):
    monkeypatch.setattr(planner, "measured_flops", lambda device, dtype: 1e12)
    monkeypatch.setattr(planner, "measured_bandwidth", lambda device: 1e10)
    alone, shared = this_machine(1), this_machine(4)
    assert shared.memory == psutil.virtual_memory().total / 4 == alone.memory / 4
    assert (shared.half_flops, shared.memory_rate) == (1e12 / 4, 1e10 / 4)
    plan = planned(device="cpu", preset="tiny", gpus=16)
    assert plan.gpus_per_node == 16
    assert plan.setup.on_cpu
    assert plan.time == step_time(plan.setup, plan.device, 16, CPU)


@pytest.mark.parametrize(("half", "dtype", "weight_bytes"), [(0.56e9, "fp32", 4), (1000e9, "bf16", 2)])
def test_auto_is_planned_in_what_this_machine_is_the_faster_in(monkeypatch, run, half, dtype, weight_bytes):
    monkeypatch.setattr(planner, "measured_flops", lambda _, dtype: half if dtype == torch.bfloat16 else 46e9)
    monkeypatch.setattr(planner, "measured_bandwidth", lambda device: 1e10)
    plan = planned(device="cpu", preset="tiny", gpus=2, ep_size=1)
    assert plan.recipe.dtype == dtype
    assert plan.setup.weight_bytes == weight_bytes
    options = ("--device", "cpu", "--preset", "tiny", "--gpus", 2, "--ds_config", ZERO2)
    assert f"2 ranks on CPU, {dtype}, ep_size 1" in run("plan", *options)[1]


def test_options_take_the_place_of_what_is_assumed():
    assert rates_of(PlanOptions(gpus=1)) == GPU
    given = PlanOptions(gpus=1, efficiency=0.5, link_efficiency=0.6, launch_us=10)
    assert rates_of(given) == replace(GPU, gemms=0.5, links=0.6, operator=1e-5)
    assert planned(launch_us=60).time.seconds > 2 * planned().time.seconds


def test_compiling_is_advised_where_it_helps():
    eager, compiled = planned(), planned(compile=True)
    assert compiled.time.seconds < eager.time.seconds
    assert (eager.time.limit, compiled.time.limit) == ("launches", "launches")
    assert advice(eager) == f"compile (--compile); {advice(compiled)}"


def test_every_limit_is_said_with_what_to_change():
    assert set(LIMITS) == set(ADVICE) == set(get_args(Part))


def test_the_best_split_is_planned_and_said(tmp_path, run):
    options = ("--gpus", 8, "--best", "--ds_config", ZERO2, "--json", tmp_path / "plan.json")
    code, out, problems = run("plan", *options)
    assert (code, problems) == (0, [])
    record = json.loads((tmp_path / "plan.json").read_text())
    best, plan = record["best"][0], record["predicted"]
    assert best["predicted"]["tokens_per_second"] == plan["time"]["tokens_per_second"]
    assert best["predicted"]["memory"] == plan["memory"]["totals"]["peak"] <= 0.9 * 79.6 * 2**30
    assert max(map(len, out.splitlines())) == 100
    keys = best["ds_config"]
    assert f'"train_micro_batch_size_per_gpu": {keys["train_micro_batch_size_per_gpu"]}' in out
    assert f"--ep_size {best['options']['ep_size']} --recompute_blocks {best['options']['recompute_blocks']}" in out
    again = planned(gpus=8, micro_batch=keys["train_micro_batch_size_per_gpu"], **best["options"])
    assert again.time.tokens_per_second == best["predicted"]["tokens_per_second"]


def test_a_search_in_which_nothing_fits_says_so(tmp_path):
    ds = shipped("zero2") | {"train_batch_size": 512}
    ds.pop("train_micro_batch_size_per_gpu")
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    wide = tmp_path / "wide.json"
    wide.write_text(load_preset("moe-680m").model_copy(update={"hidden_size": 12288}).model_dump_json())
    with pytest.raises(UserError, match=r"nothing with 512 samples per step fits in 71\.64 GiB on 2 ranks"):
        planned(gpus=2, ep_size=1, best=True, preset=str(wide), ds_config=str(tmp_path / "ds.json"))


def test_whatever_a_step_takes_it_gives_back():
    setup = planned().setup
    models = itertools.cycle(
        setup.model.model_copy(update={**PRESET, "num_latent_tokens": latents}) for latents in (0, 3)
    )
    ranks = itertools.cycle((0, 5, 15))
    names = ("zero_stage", "overlap", "accumulation", "on_cpu", "offload")
    for values in itertools.product((1, 2), (True, False), (1, 2, 3), (True, False), (True, False)):
        changed = replace(setup, model=next(models), ep_size=4, **dict(zip(names, values, strict=True)))
        found = footprint(changed, next(ranks))  # which asserts it
        assert all(size >= 0 for size in found.peak.values()), changed
        assert found.peak.total() > max(found.between.total(), found.peak["activations"]), changed
