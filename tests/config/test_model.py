"""Presets and the fields of a run; every refusal names the value, the limit and the remedy. What does not fit between
fields has `test_model_checks.py`."""

import json
from pathlib import Path

import pytest
from refusals import has, only, refusals
from toy import PRESET

from megamoe.config.model import PRESET_DIR, ModelConfig, load_preset, preset_names, validate
from megamoe.config.run import Corpus, RunConfig, parse_run


def shape(**changes):
    return {key: value for key, value in {**PRESET, **changes}.items() if value is not ...}


def shape_refusals(**changes):
    return refusals(validate, ModelConfig, shape(**changes), "my.json")


def test_every_shipped_preset_has_its_name_and_loads_with_what_its_file_says():
    paths = list(PRESET_DIR.glob("*.json"))
    assert preset_names() == sorted(path.stem for path in paths)
    for path in paths:
        config, said = load_preset(path.stem).model_dump(), json.loads(path.read_text())
        assert {key: config[key] for key in said} == said
        assert load_preset(str(path)).model_dump() == config


def test_margins_are_counted_for_a_bias_that_needs_them():
    def counts(**changes):
        return ModelConfig(**shape(num_local_experts=8, router_bias_rule="quantile", **changes)).counts_margins

    assert counts(num_experts_per_tok=2)
    assert not counts(num_experts_per_tok=8)  # nothing to balance
    assert not counts(num_experts_per_tok=2, router_bias=False)


def test_an_unknown_preset_names_the_known_ones():
    has(only(refusals(load_preset, "tinny")), "'tinny'", "moe-680m", "tiny", ".json")
    has(only(refusals(load_preset, "no/such.json")), "no/such.json", "tiny")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_sise": 3}, ['"hidden_sise"', 'did you mean "hidden_size"?']),
        ({"zzz": 3}, ['"zzz"', "known keys are", "hidden_size", "rope_theta"]),
        ({"hidden_size": ...}, ['"hidden_size"', "missing", "add it"]),
        ({"hidden_size": -3}, ['"hidden_size"', "-3", "greater than 0", "change it"]),
        ({"hidden_size": "64"}, ['"hidden_size"', '"64"', "valid integer"]),
        ({"hidden_size": True}, ['"hidden_size"', "true", "valid integer"]),
        ({"hidden_size": 64.5}, ['"hidden_size"', "64.5", "valid integer"]),
        ({"head_dim": 33}, ['"head_dim"', "33", "multiple of 2"]),
        ({"expert_dropout": 1}, ['"expert_dropout"', "1", "less than 1"]),
        ({"rms_norm_eps": "1e-8"}, ['"rms_norm_eps"', '"1e-8"', "valid number"]),
        ({"router_score": "softmx"}, ['"softmx"', "'softmax'", "'sigmoid'"]),
    ],
    ids=str,
)
def test_a_wrong_field_of_a_preset_is_one_sentence(changes, parts):
    has(only(shape_refusals(**changes)), "my.json", *parts)


def test_sizes_far_above_any_real_model_are_refused_before_anything_is_made():
    sizes = {key for key, value in ModelConfig(**shape()).model_dump().items() if type(value) is int}
    for key in sizes - {"num_experts_per_tok"}:  # which num_local_experts bounds
        (found,) = (text for text in shape_refusals(**{key: 10**12}) if f'"{key}" is 1000000000000' in text)
        has(found, "less than or equal to", "change it")


def test_the_run_folder_has_the_name_of_the_preset_by_default(tmp_path, monkeypatch):
    (tmp_path / "above" / "here.2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here.2")
    for preset, folder in {
        "tiny": "tiny",
        "mine/small.json": "small",
        "../v1.5.json": "v1.5",
        "hf/Qwen1.5-MoE": "Qwen1.5-MoE",
        "hf/Qwen1.5-MoE/": "Qwen1.5-MoE",
        ".": "here.2",
        "..": "above",
    }.items():
        assert RunConfig(ds_config="x.json", preset=preset).folder == Path("runs") / folder
        assert RunConfig(ds_config="x.json", preset=preset, run_dir="mine").folder == Path("mine")


def test_data_is_a_path_or_a_path_with_its_weight_or_name():
    run = parse_run(["--data", "a", "b=2.5", "c=d=1", "--valid_data", "mine=e", "f/valid"])
    assert [(one.name, one.path) for one in run.valid_data] == [("mine", "e"), ("f", "f/valid")]
    assert run.data == [Corpus(path="a"), Corpus(path="b", weight=2.5), Corpus(path="c=d", weight=1)]


def test_a_time_limit_is_written_as_slurm_writes_it():
    for words, seconds in {"90": 5400, "0.5": 30, "0:00:25": 25, "1:30:00": 5400, "2-12:00:00": 216_000}.items():
        assert validate(RunConfig, {"time_limit": words}, "command line").time_limit == seconds


@pytest.mark.parametrize(
    ("words", "recipe"),
    [("", "zero2"), ("--preset moe-680m-plus", "zero2"), ("--preset small", "zero2"), ("--preset tiny", "tiny"),
     ("--preset tiny-plus", "tiny_plus"), ("--preset tiny-glm", "tiny"),
     ("--preset mine.json --ds_config zero1", "zero1")],
)  # fmt: skip
def test_without_a_file_the_recipe_is_the_shipped_one_of_that_name_or_of_the_preset(words, recipe):
    given, shipped = Path(parse_run(words.split()).ds_config), Path(__file__).parents[2] / "ds_configs"
    assert given.samefile(shipped / f"{recipe}.json")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            "--preset olmoe-7b-a1b",
            ["no recipe is shipped for the preset olmoe-7b-a1b; give the path", "zero2, zero2_fp"],
        ),
        ("--preset tiny_plus", ["preset 'tiny_plus' does not exist; use one of ", "tiny-plus"]),
        ("--ds_config zero9", ["zero9 is neither a file nor the name of a shipped recipe", "one of tiny, tiny_plus"]),
        ("--ep_size 0", ['"ep_size" is "0"', "greater than 0"]),
        ("--data x=much", ["'x=much'", "PATH=WEIGHT"]),
        *((f"--data x={weight}", ["weight"]) for weight in ("0", "inf")),
        *((f"--time_limit={words}", ["time_limit"]) for words in ("1:30", "0")),
    ],
)
def test_a_bad_command_line_is_refused_with_the_value_and_the_remedy(words, parts):
    has(only(refusals(parse_run, words.split())), *parts)
