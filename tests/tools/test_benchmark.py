"""The benchmark runs and adds up. How fast anything is, is not for a test to say."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import benchmark
import benchmark_contender
import pytest
import torch
from benchmark_contender import Machine, Turn, gemm_flops
from benchmark_models import build_engine_contender, build_mixtral
from ranks import run_alone, run_ranks
from refusals import has, refusal, refusals
from toy import PRESET, SHIPPED

from megamoe.config.model import ModelConfig, load_preset
from megamoe.config.precision import by_rates
from megamoe.model.costs import parameter_count

FULL = load_preset("moe-680m")
RECIPE = str(SHIPPED / "zero2_fp32.json")


def parameters(contender):
    return sum(parameter.numel() for parameter in contender.model.parameters())


def sizes_of_engines():
    return [parameters(build_engine_contender(ModelConfig(**PRESET), RECIPE, 1, 2, 0, stock)) for stock in (0, 1)]


def test_the_contenders_are_of_one_size():
    assert run_ranks(1, sizes_of_engines) == [[parameter_count(ModelConfig(**PRESET))] * 2]
    with torch.device("meta"):
        mixtral = build_mixtral(FULL, RECIPE, torch.device("meta"))
    assert parameters(mixtral) == pytest.approx(parameter_count(FULL), rel=0.005)


def test_the_rate_of_products_counts_three_for_every_weight(monkeypatch):
    # Every product takes one second: the rate is the mean of their operations, known from the parameters at work.
    monkeypatch.setattr(benchmark_contender, "timed", lambda *args, device: 1.0)
    config = ModelConfig(**{**PRESET, "num_latent_tokens": 1})
    tokens, layers = 512, config.num_hidden_layers
    calls = 3 * (2 + 2 + 2 * config.num_local_experts + 1 / layers)
    rate = gemm_flops(config, tokens, 1, torch.device("cpu"), torch.float32)
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    experts = 2 * config.num_experts_per_tok * config.intermediate_size
    at_work = config.hidden_size * (attention + experts + config.vocab_size / layers)
    assert rate == pytest.approx(6 * tokens * at_work / calls)


def turn(**changes):
    machine = Machine(gemm_flops=2e9, peak_flops=4e9, bandwidth=1e9, device="CPU", dtype="bfloat16")
    defaults = {
        "tokens": 100,
        "memory_gib": 1.0,
        "forward_backward": [1.0, 3.0, 2.0],
        "update": [0.5, 0.5, 0.5],
        "bare_update": [0.25, 0.25, 0.25],
    }
    return Turn(flops=2e9, machine=machine, **{**defaults, **changes})


def test_figures_are_medians_over_steps_and_ratios_compare_turns_of_the_same_round():
    one = turn()
    assert one.step_seconds == 2.5
    assert one.tokens_per_second == 40
    assert one.gemm_share == 2e9 / 2.0 / 2e9
    assert one.mfu == 2e9 / 2.5 / 4e9
    assert one.update_ratio == 2
    # The first round on a slow machine, the second on a quick one.
    ours, others = (
        [turn(forward_backward=[seconds], update=[0.5]) for seconds in rounds] for rounds in ((11.5, 1.5), (23.5, 3.5))
    )
    assert benchmark.speed_up(ours, others) == 2


def test_a_contender_that_cannot_run_is_refused(monkeypatch):
    def refused(word):
        return refusal(lambda: benchmark.entry_of(word, "mine", (2,), ModelConfig(**PRESET)))

    for word, says in (
        ("megamoe", "NAME:RANKS"),
        ("other:1", "'other:1'"),
        ("mixtral:2", "mixtral:1"),
        ("megamoe:3", "2 samples and the 4 experts of mine"),
        ("megamoe:1@/", "/ has no tools/benchmark_contender.py"),
    ):
        has(refused(word), word, says)
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    has(refused("mixtral:1"), "mixtral:1", "transformers", "pip install")


def test_all_problems_of_the_command_line_come_at_once(monkeypatch):
    words = ["--preset", "tiny", "--growth", "--samples", "0", "--rounds", "0", "--ds_config", "none.json"]
    words += ["--json", "nowhere/seen.json", "--contenders", "stock", "megamoe:1", "megamoe:01"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    # 0 samples, 0 rounds, two for --growth, no DeepSpeed JSON, no folder for --json, no ranks, one contender twice
    assert len(refusals(benchmark.main)) == 8


def test_all_turns_compute_in_what_this_device_is_the_faster_in(tmp_path, monkeypatch, capsys):
    for half, choice in ((0.56e9, "fp32"), (1000e9, "bf16")):
        monkeypatch.setattr(benchmark, "precision_of", lambda device, half=half: by_rates(half, 46e9))
        ds = json.loads(Path(benchmark.resolved_file(str(SHIPPED / "zero2.json"), tmp_path)).read_text())
        assert ds["bf16"]["enabled"] == (choice == "bf16")
        has(capsys.readouterr().err, f"computes in {choice}: ")


def contend(words):
    sys.argv = words
    benchmark_contender.precision_of = lambda device: by_rates(1e12, 1e12)  # to measure takes longer than the steps
    benchmark_contender.measured_bandwidth = lambda *_: 1e10
    benchmark_contender.main()


def start(command, env, **_):
    """One rank is forked, with its imports done, not started by torch's launcher."""
    *launch, script = command[:6]
    assert launch == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    assert env["PYTHONPATH"].startswith(str(benchmark.ROOT))
    run_alone(contend, [script, *command[6:]])
    return subprocess.CompletedProcess(command, 0, stderr="")


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys):
    """Runs the program; returns what it writes and what it prints."""

    def measure(*words):
        (tmp_path / "preset.json").write_text(json.dumps(PRESET))
        fixed = ["--preset", tmp_path / "preset.json", "--ds_config", RECIPE, "--rounds", "1", "--steps", "1"]
        fixed += ["--json", tmp_path / "seen.json"]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, fixed), *words])
        monkeypatch.setattr(benchmark.subprocess, "run", start)
        benchmark.main()
        return json.loads((tmp_path / "seen.json").read_text()), capsys.readouterr().out

    return measure


def test_the_program_measures_all_contenders_and_writes_what_it_saw(measure):
    seen, said = measure("--contenders", "megamoe:1", "stock:1", "mixtral:1")
    assert len(seen) == 3
    for name, (one,) in seen.items():
        assert name in said
        assert one["tokens"] == 2 * PRESET["max_position_embeddings"]
        assert one.keys() == asdict(turn()).keys()
        assert one["machine"]["peak_flops"] == 1e12  # of `contend`
        assert min(*one["forward_backward"], *one["update"], *one["bare_update"]) > 0
        assert sum(one["bare_update"]) < sum(one["update"])
        if one["pieces"]:
            pieces = benchmark.seconds_by_piece(Turn(**one))
            assert min(pieces.values()) >= 0
            step = one["pieces"]["forward and backward"] + one["pieces"]["update"]
            assert sum(list(pieces.values())[:-1]) == pytest.approx(step)
    ours, stock, mixtral = (one["pieces"] for (one,) in seen.values())
    timed = {f"{name} {way}" for name in ("attention", "moe", "router", "expert") for way in ("forward", "backward")}
    assert timed <= ours.keys()
    assert "router forward" not in stock
    assert mixtral == {}


def test_steps_of_several_sizes_are_timed_and_profiled_by_one_start(measure):
    seen, said = measure("--samples", "4", "2", "--profile", "--contenders", "megamoe:1")
    ((small, large),) = seen.values()
    length = PRESET["max_position_embeddings"]
    assert (small["tokens"], large["tokens"]) == (2 * length, 4 * length)
    assert small["profile"]["operators"] > 100
    assert large["profile"] is None
    has(said, f"| {2 * length} | ", f"| {4 * length} | ", f"| megamoe, 1 rank | {2 * length} | ")


def test_sizes_end_where_memory_does_and_any_other_end_is_an_error(monkeypatch, capsys):
    for samples, stderr, fits in (
        ((1, 2, 4, 8), "torch.OutOfMemoryError: CUDA out of memory.", True),
        ((1, 2, 4, 8), "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", True),
        ((1, 2, 4, 8), "KeyError", False),
        ((4,), "torch.OutOfMemoryError: CUDA out of memory.", False),
    ):
        done = [turn(tokens=100 * size) for size in samples if size < 4]

        def fail_at_four_samples(command, done=done, stderr=stderr, **options):
            out = next(word for word in command if word.endswith("turn.json"))
            Path(out).write_text(json.dumps([asdict(one) for one in done]))
            return subprocess.CompletedProcess(command, 1, stderr=stderr)

        monkeypatch.setattr(benchmark.subprocess, "run", fail_at_four_samples)
        cases = {"ours": benchmark.Entry("megamoe", 1, "tiny", samples, 100)}
        if fits:
            assert benchmark.take_turns(cases, RECIPE, 1, 1, pieces=False, profile=False) == [done]
            has(capsys.readouterr().err, "ours", "out of memory at 400 tokens per step")
        else:
            with pytest.raises(benchmark.ContenderFailed, match="ended with code 1") as failed:
                benchmark.take_turns(cases, RECIPE, 1, 1, pieces=False, profile=False)
            assert failed.value.turns == done
            has(capsys.readouterr().err, stderr)


def test_a_size_that_did_not_fit_is_in_the_table_and_one_that_was_not_tried_is_empty():
    ours, theirs = [turn(tokens=tokens) for tokens in (100, 200, 400)], [turn(tokens=100)]
    rows = benchmark.table_of_sizes(["ours", "theirs"], [ours, theirs], [None, 400]).splitlines()[-3:]
    assert rows == [
        "| 100 | 40 tokens/s, 20.0% MFU, 1.0 GiB | 40 tokens/s, 20.0% MFU, 1.0 GiB |",
        "| 200 | 80 tokens/s, 20.0% MFU, 1.0 GiB |  |",
        "| 400 | 160 tokens/s, 20.0% MFU, 1.0 GiB | out of memory |",
    ]


def test_growth_changes_one_size_at_a_time(tmp_path):
    cases = list(benchmark.growth_entries("moe-680m", tmp_path).values())
    shapes = []
    for case in cases:
        config = load_preset(case.preset)
        assert config.num_hidden_layers == 2
        assert config.hidden_size == FULL.hidden_size
        (samples,) = case.samples
        tokens = samples * case.seq_len
        shapes.append((tokens, case.seq_len, config.num_local_experts, case.ranks, case.recompute_blocks))
    assert len(set(shapes)) == len(shapes)
    for shape in shapes[1:]:
        assert sum(a != b for a, b in zip(shape, shapes[0], strict=True)) == 1
