"""Phases of a run, from their file."""

import json

import pytest
from refusals import has, only, refusal, refusals
from toy import ds_config, recipe_of

from megamoe.config.phases import PhaseSettings, make_phases, read_phases
from megamoe.config.run import Corpus

OWN = {"data": [Corpus(path="web")], "seq_len": 16, "micro_batch": 2, "samples": 8, "world_size": 2}


def made(*given, **others):
    return make_phases([PhaseSettings(**one) for one in given], **{**OWN, **others})


def test_a_phase_lasts_for_its_tokens_in_whole_steps_and_has_the_runs_own_where_it_says_nothing():
    phases = made(
        {"tokens": 2 * 4 * 16, "samples_per_step": 4},
        {"tokens": 8 * 16 + 1},
        {"data": ["web=3", "code"], "seq_len": 32, "micro_batch": 1},
    )
    first, second, third = phases.all
    assert [one.first_step for one in phases.all] == [1, 3, 5]
    assert (first.samples, first.accumulation, first.seq_len) == (4, 1, 16)
    assert (second.samples, second.accumulation, second.data) == (8, 2, (Corpus(path="web"),))
    assert (third.seq_len, third.micro_batch, third.accumulation) == (32, 1, 4)
    assert [(one.path, one.weight) for one in third.data] == [("web", 3.0), ("code", 1.0)]
    for step in range(1, 12):
        assert phases.at(step) == (first, first, second, second, third)[min(step, 5) - 1]
        sizes = [one.samples * one.seq_len for one in map(phases.at, range(1, step))]
        assert phases.tokens_before(step) == sum(sizes)


@pytest.mark.parametrize(
    ("given", "others", "parts"),
    [
        ([{"samples_per_step": 6}], {}, ["phase 1", "6 samples", "2 per rank x 2 ranks is 4", "multiple of 4"]),
        ([{"tokens": 9}, {"seq_len": 65}], {"longest": 64}, ["phase 2", "seq_len 65", "64", "rope_scaling"]),
        ([{"data": ["a", "b", "a=2"]}], {}, ["phase 1 names a twice", "the sum"]),
        ([{"tokens": 1280}], {"last_step": 11}, ["end at step 10", "run at 11", "--steps"]),
    ],
)
def test_what_does_not_fit_is_refused(given, others, parts):
    has(only(refusals(lambda: made(*given, **others))), *parts)


def test_a_file_of_phases_is_checked(tmp_path):
    file = tmp_path / "phases.json"
    for content, parts in (
        ({"phases": []}, ["phases", "at least 1"]),
        ({"phases": [{"data": ["a"]}, {"tokens": 4}]}, [str(file), "phase 1", "no tokens"]),
        ({"phases": [{}, {"token": 4}]}, [f'{file}: phase 2: unknown key "token"; did you mean "tokens"']),
        ({"phases": [{"tokens": 4, "data": ["a=x"]}]}, ["PATH=WEIGHT"]),
    ):
        file.write_text(json.dumps(content))
        has(refusal(read_phases, str(file)), *parts)
    file.write_text(json.dumps({"phases": [{"tokens": 1e9, "data": ["a=0.5", "b"]}, {}]}))
    assert [one.tokens for one in read_phases(str(file))] == [10**9, None]


def test_a_step_after_so_many_tokens_is_the_first_that_reaches_them():
    phases = made({"tokens": 100, "samples_per_step": 4}, {"tokens": 300}, {"seq_len": 32, "samples_per_step": 12})
    for tokens in range(0, 3000, 7):
        step = phases.step_after(tokens)
        assert phases.tokens_before(step + 1) >= tokens
        assert step == 0 or phases.tokens_before(step) < tokens


def test_a_schedule_in_tokens_is_one_in_the_steps_of_the_phases():
    params = {"warmup_type": "linear", "warmup_max_lr": 1.0, "decay_num_tokens": 2048, "decay_type": "1-sqrt"}
    params |= {"warmup_num_tokens": 64, "total_num_tokens": 1e4}
    ds = {**ds_config(2), "scheduler": {"type": "WarmupStableDecayLR", "params": params}}
    phases = made({"tokens": 2 * 4 * 16, "samples_per_step": 4}, {})  # two steps of 64 tokens, then of 128
    schedule = recipe_of(ds).in_steps(phases.step_after).schedule
    assert (schedule.warmup_steps, schedule.total_steps, schedule.decay_steps) == (1, 80, 16)
    assert recipe_of(ds_config(2)).in_steps(phases.step_after) == recipe_of(ds_config(2))
    params["warmup_num_steps"] = 3
    has(refusal(recipe_of, ds), "counts tokens", "warmup_num_steps", "one unit")
