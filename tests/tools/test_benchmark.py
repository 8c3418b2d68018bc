"""The benchmark runs and adds up. How fast anything is, is not for a test to say."""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest import mock

import benchmark
import benchmark_contender
import pytest
import torch
from benchmark_contender import Clock, Machine, Turn, gemm_flops, timed_pieces
from benchmark_models import build_engine_contender, build_mixtral
from ranks import run_alone, run_ranks
from refusals import has, refusal, sentences
from toy import PRESET, SHIPPED

from megamoe.config import ModelConfig, load_preset
from megamoe.model.costs import parameter_count
from megamoe.training.distributed import init_distributed

FULL = load_preset("moe-680m")
RECIPE = str(SHIPPED / "zero2_fp32.json")


def parameters(contender):
    return sum(parameter.numel() for parameter in contender.model.parameters())


def sizes_of_contenders():
    _, device = init_distributed()
    config = ModelConfig(**PRESET)
    ours, stock = (build_engine_contender(config, RECIPE, 1, 2, 0, stock) for stock in (False, True))
    return [parameters(ours), parameters(stock), parameters(build_mixtral(config, RECIPE, device))]


def test_the_contenders_are_of_one_size():
    (sizes,) = run_ranks(1, sizes_of_contenders)
    ours, stock, mixtral = sizes
    assert ours == stock == parameter_count(ModelConfig(**PRESET))
    assert mixtral == pytest.approx(ours, rel=0.1)  # its experts' width is a multiple of 16


def test_mixtral_has_the_full_models_parameters_to_half_a_percent():
    with torch.device("meta"):
        mixtral = build_mixtral(FULL, RECIPE, torch.device("meta"))
    assert parameters(mixtral) == pytest.approx(parameter_count(FULL), rel=0.005)


def timed_step():
    _, device = init_distributed()
    contender = build_engine_contender(ModelConfig(**PRESET), RECIPE, 1, 2, 0, stock=False)

    def hooks():
        return sum(len(module._forward_hooks) + len(module._backward_hooks) for module in contender.model.modules())

    clock, before = Clock(device), hooks()
    with clock.measure("forward and backward"), timed_pieces(contender.model, clock):
        contender.forward_backward(torch.arange(32).view(2, 16))
    return clock.seconds, hooks() - before, torch.distributed.all_reduce.__name__


def test_every_piece_is_timed_both_ways_within_the_step_and_the_model_is_left_as_it_was():
    ((seconds, hooks_left, all_reduce),) = run_ranks(1, timed_step)
    pieces = {f"{name} {way}" for name in ("attention", "moe", "router", "expert") for way in ("forward", "backward")}
    assert pieces <= seconds.keys()
    assert all(seconds[name] > 0 for name in pieces)
    outer = sum(seconds[f"{name} {way}"] for name in ("attention", "moe") for way in ("forward", "backward"))
    assert outer < seconds["forward and backward"]
    assert sum(seconds[f"{name} forward"] for name in ("router", "expert")) < seconds["moe forward"]
    assert hooks_left == 0
    assert all_reduce == "all_reduce"


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


def test_figures_of_a_turn_are_medians_over_its_steps():
    one = turn()
    assert one.step_seconds == 2.5
    assert one.tokens_per_second == 40
    assert one.gemm_share == 2e9 / 2.0 / 2e9
    assert one.mfu == 2e9 / 2.5 / 4e9
    assert one.update_ratio == 2


def test_a_ratio_compares_turns_of_the_same_round():
    slow_machine = {"forward_backward": [11.5], "update": [0.5]}
    quick_machine = {"forward_backward": [1.5], "update": [0.5]}
    ours = [turn(**slow_machine), turn(**quick_machine)]
    others = [turn(forward_backward=[23.5], update=[0.5]), turn(forward_backward=[3.5], update=[0.5])]
    assert benchmark.speed_up(ours, others) == 2


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("megamoe", "NAME:RANKS"),
        ("other:1", "'other:1'"),
        ("mixtral:2", "mixtral:1"),
        ("megamoe:3", "2 samples and the 4 experts of mine"),
        ("megamoe:1@/", "/ has no tools/benchmark_contender.py"),
    ],
)
def test_a_contender_that_cannot_run_is_refused(word, says):
    problem = refusal(lambda: benchmark.entry_of(word, "mine", (2,), ModelConfig(**PRESET)))
    has(problem, word, says)


def test_all_problems_of_the_command_line_come_at_once():
    words = ["--preset", "tiny", "--growth", "--samples", "0", "--rounds", "0", "--ds_config", "none.json"]
    words += ["--json", "nowhere/seen.json", "--contenders", "stock", "megamoe:1", "megamoe:01"]
    done = subprocess.run([sys.executable, benchmark.__file__, *words], capture_output=True, text=True)
    assert done.returncode == 2
    problems = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
    # 0 samples, 0 rounds, two for --growth, no DeepSpeed JSON, no folder for --json, no ranks, one contender twice
    assert len(sentences(problems)) == 8


def test_mixtral_without_transformers_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    has(
        refusal(lambda: benchmark.entry_of("mixtral:1", "mine", (2,), ModelConfig(**PRESET))),
        "mixtral:1",
        "transformers",
        "pip install",
    )


def contend(words):
    sys.argv = words
    benchmark_contender.main()


def start(command, real=subprocess.run, **options):
    """Two ranks start as the program starts them; one alone is forked, with its imports done."""
    if "--nproc_per_node=2" in command:
        return real(command, **options)
    script = next(number for number, word in enumerate(command) if word.endswith("benchmark_contender.py"))
    run_alone(contend, command[script:])
    return None


def test_the_program_measures_all_contenders_and_writes_what_it_saw(tmp_path, monkeypatch, capsys):
    (tmp_path / "preset.json").write_text(json.dumps(PRESET))
    entries = ["megamoe:2", "stock:1", "mixtral:1"]
    words = ["--preset", tmp_path / "preset.json", "--ds_config", RECIPE, "--rounds", "1", "--steps", "1"]
    words += ["--json", tmp_path / "seen.json", "--contenders", *entries]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, words)])
    monkeypatch.setattr(benchmark.subprocess, "run", start)
    benchmark.main()
    said = capsys.readouterr().out
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert len(seen) == len(entries)
    for name, (one,) in seen.items():
        assert name in said
        assert one["tokens"] == 2 * PRESET["max_position_embeddings"]
        assert one.keys() == asdict(turn()).keys()
        assert min(*one["forward_backward"], *one["update"], *one["bare_update"]) > 0
        assert sum(one["bare_update"]) < sum(one["update"])
        if one["pieces"]:
            pieces = benchmark.seconds_by_piece(Turn(**one))
            assert min(pieces.values()) >= 0
            step = one["pieces"]["forward and backward"] + one["pieces"]["update"]
            assert sum(list(pieces.values())[:-1]) == pytest.approx(step)
    ours, stock, mixtral = seen.values()
    assert ours[0]["pieces"]["collectives"] > 0
    assert "router forward" not in stock[0]["pieces"]
    assert mixtral[0]["pieces"] == {}


def test_steps_of_several_sizes_are_timed_and_profiled_by_one_start(tmp_path, monkeypatch, capsys):
    (tmp_path / "preset.json").write_text(json.dumps(PRESET))
    words = ["--preset", tmp_path / "preset.json", "--ds_config", RECIPE, "--rounds", "1", "--steps", "1"]
    words += ["--samples", "4", "2", "--profile", "--json", tmp_path / "seen.json", "--contenders", "megamoe:1"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, words)])
    monkeypatch.setattr(benchmark.subprocess, "run", start)
    benchmark.main()
    ((small, large),) = json.loads((tmp_path / "seen.json").read_text()).values()
    length = PRESET["max_position_embeddings"]
    assert (small["tokens"], large["tokens"]) == (2 * length, 4 * length)
    assert small["profile"]["operators"] > 100
    assert large["profile"] is None
    said = capsys.readouterr().out
    has(said, f"| {2 * length} | ", f"| {4 * length} | ", f"| megamoe, 1 rank | {2 * length} | ")


@pytest.mark.parametrize(
    ("samples", "stderr", "fits"),
    [
        ((1, 2, 4, 8), "torch.OutOfMemoryError: CUDA out of memory.", True),
        (
            (1, 2, 4, 8),
            "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            True,
        ),
        ((1, 2, 4, 8), "KeyError", False),
        ((4,), "torch.OutOfMemoryError: CUDA out of memory.", False),
    ],
)
def test_sizes_end_where_memory_does_and_any_other_end_is_an_error(samples, stderr, fits, monkeypatch, capsys):
    def fail_at_four_samples(command, **options):
        out = next(word for word in command if word.endswith("turn.json"))
        Path(out).write_text(json.dumps([asdict(turn(tokens=100 * size)) for size in samples if size < 4]))
        return subprocess.CompletedProcess(command, 1, stderr=stderr)

    monkeypatch.setattr(benchmark.subprocess, "run", fail_at_four_samples)
    cases = {"ours": benchmark.Entry("megamoe", 1, "tiny", samples, 100)}

    def turns():
        return benchmark.take_turns(cases, RECIPE, 1, 1, pieces=False, profile=False)

    done = [turn(tokens=100 * size) for size in samples if size < 4]
    if fits:
        assert turns() == [done]
        has(capsys.readouterr().err, "ours", "out of memory at 400 tokens per step")
    else:
        with pytest.raises(benchmark.ContenderFailed, match="ended with code 1") as failed:
            turns()
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


@pytest.mark.parametrize(
    ("kernel", "short"),
    [
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int, float)",
         "vectorized_elementwise_kernel"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::X<1>>(T)", "multi_tensor_apply_kernel"),
        ("triton_red_fused_" + "x" * 80, "triton_red_fused_" + "x" * 43),
        ("Memcpy DtoH (Device -> Pinned)", "Memcpy DtoH"),
    ],
)  # fmt: skip
def test_the_table_names_a_kernel_by_its_last_name(kernel, short):
    assert benchmark.short_name(kernel) == short


def sizes_compiled(preset, samples):
    """How many unknown sizes each graph that is compiled takes, over steps of all `samples`."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(sum(isinstance(one, torch.SymInt) for one in inputs))
        return graph

    args = argparse.Namespace(
        contender="compiled", preset=preset, ds_config=RECIPE, ep_size=1, samples=samples, seq_len=16, steps=1,
        recompute_blocks=0, pieces=False, profile=False,
    )  # fmt: skip
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        assert len(list(benchmark_contender.run(args))) == len(samples)
    return graphs


def test_each_size_of_the_compiled_contender_is_compiled_as_the_only_one(tmp_path):
    (tmp_path / "preset.json").write_text(json.dumps(PRESET))
    graphs = run_alone(sizes_compiled, str(tmp_path / "preset.json"), [2, 4])
    assert len(graphs) == 4
    assert graphs[:2] == graphs[2:]


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
