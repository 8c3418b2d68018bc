"""The table of optimizers: what DeepSpeed really keeps is what it says, and an entry is all that a new one needs."""

import json
from functools import cache, partial

import pytest
from engines import load_and_train, make, same_state, train, train_and_save
from ranks import run_ranks
from refusals import complaints, has, only
from toy import ds_config

from megamoe.checkpoint.opening import open_source
from megamoe.checkpoint.universal import write_universal
from megamoe.config.optimizers import find_optimizer
from megamoe.config.recipe import parse_recipe
from megamoe.formats.source import load_buffers

OFFLOADED = {"stage": 2, "reduce_bucket_size": 5000, "offload_optimizer": {"device": "cpu"}}
LION = {"optimizer": {"type": "Lion", "params": {"weight_decay": 0.05}}, "zero_optimization": OFFLOADED}
ADAMW_OFFLOADED = {"optimizer": {"type": "AdamW", "params": {}}, "zero_optimization": OFFLOADED}

MUON = {"optimizer": {"type": "Muon", "params": {"muon_lr": 0.02, "weight_decay": 0.05}}}


def json_with(optimizer, **params):
    return ds_config(2, optimizer={"type": optimizer, "params": params})


def problems_of(ds, on_cpu=False):
    return complaints(parse_recipe, ds, "ds.json", 1, on_cpu, "bf16")


def state_of(kwargs):
    """Names, types and shapes of what the optimizer keeps on this rank after a step, by name."""
    engine = make(1, **kwargs)
    train(engine, 1)
    optimizer = engine.optimizer.optimizer
    (masters,) = optimizer.param_groups[0]["params"]
    return {
        name: (value.dtype, value.shape == masters.shape) if getattr(value, "dim", int)() else "step"
        for name, value in optimizer.state[masters].items()
    }


def states_of(*several):
    return [state_of(kwargs) for kwargs in several]


def test_deepspeed_keeps_the_state_that_the_table_says():
    names, (states,) = ("AdamW", "AdamW", "Lion"), run_ranks(1, states_of, {}, ADAMW_OFFLOADED, LION)
    for name, kept in zip(names, states, strict=True):
        spec = find_optimizer(name)
        expected = {tensor.name: (tensor.dtype, True) for tensor in spec.state}
        assert kept == {**expected, **({"step": "step"} if spec.counts_steps else {})}


NO_OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "none"}}
REFUSED = [
    ("Lyon", {}, {}, ['optimizer.type is "Lyon"', "Adam, AdamW, Lion, Muon"]),
    ("Lion", {"eps": 1e-8}, OFFLOADED, ["optimizer.params", 'unknown key "eps"']),
    ("Lion", {}, {"stage": 2}, ["Lion", "CPU", '"offload_optimizer"', "AdamW"]),
    ("Lion", {}, NO_OFFLOAD, ["offload_optimizer"]),
    ("Muon", {}, {}, ['optimizer.params: "muon_lr" is missing; add it']),
    ("Muon", {"muon_lr": 0.02, "adam_lr": 1e-3}, {}, ["given twice", "adam_lr 0.001", "0.01"]),
    *(("Muon", {"muon_lr": wrong}, {}, [f'"muon_lr" is {json.dumps(wrong)}']) for wrong in (0, None, "auto")),
    ("Muon", {"muon_lr": 0.02, "momentum": 1}, {}, ['"momentum" is 1', "less than 1"]),
    ("Muon", {"muon_lr": 0.02, "ns_method": "gram"}, {}, ["ns_method"]),
    ("Muon", {"muon_lr": 0.02}, OFFLOADED, ['"Muon"', "offload_optimizer", "AdamW"]),
]


@pytest.mark.parametrize(("name", "params", "zero", "parts"), REFUSED)
def test_an_optimizer_that_cannot_train_so_is_refused(name, params, zero, parts):
    ds = json_with(name, **params)
    has(only(problems_of({**ds, "zero_optimization": zero or ds["zero_optimization"]}, on_cpu=True)), *parts)


def test_what_an_optimizer_takes_is_accepted():
    lion = json_with("Lion", betas=[0.95, 0.98], weight_decay=0.1)
    assert problems_of(lion) == []
    assert problems_of({**lion, "zero_optimization": OFFLOADED}, on_cpu=True) == []
    assert problems_of(json_with("Muon", muon_lr=0.02, adam_lr=1e-2, momentum=0.9, betas=[0.9, 0.95], eps=1e-8)) == []


# --- checkpoints; in megamoe's own form they are in tests/checkpoint/test_restore.py --------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By the optimizer's name (JSON, checkpoint saved at step 3 by 2 ranks x ep_size 2, losses of the 3 steps that
    follow, how far those may be from them on other ranks)."""

    @cache
    def run(name):
        ds, most = {"Lion": (LION, 1e-4), "Muon": (MUON, 1e-5)}[name]
        folder = tmp_path_factory.mktemp("saved")
        _, losses = run_ranks(2, partial(train_and_save, further=3, **ds), folder, 2)[0]
        return ds, folder / "step_3", losses, most

    return run


@pytest.mark.parametrize("name", ["Lion", "Muon"])
def test_a_checkpoint_holds_the_states_of_the_table_and_goes_on_by_way_of_a_universal_one(saved, tmp_path, name):
    ds, checkpoint, losses, most = saved(name)
    assert set(open_source(checkpoint).state_names) == {tensor.name for tensor in find_optimizer(name).state}
    write_universal(open_source(checkpoint), {}, tmp_path / "universal")
    same_state(checkpoint, tmp_path / "universal")
    _, resumed = run_ranks(1, partial(load_and_train, steps=3, **ds), tmp_path / "universal", 1)[0]
    assert resumed == pytest.approx(losses, abs=most)


def go_on_by_deepspeed(folder, ds):
    engine = make(2, seed=99, unchecked={"checkpoint": {"load_universal": True}}, **ds)
    engine.load_checkpoint(str(folder), tag="universal")
    load_buffers(engine.module, open_source(folder / "universal"))  # DeepSpeed restores none from it
    return train(engine, 3, engine.global_steps)


def test_deepspeeds_own_loader_takes_the_universal_checkpoint_of_muon(saved, tmp_path):
    ds, checkpoint, losses, most = saved("Muon")
    write_universal(open_source(checkpoint), {}, tmp_path / "universal")
    (tmp_path / "latest_universal").write_text("universal")
    assert run_ranks(2, go_on_by_deepspeed, tmp_path, ds)[0] == pytest.approx(losses, abs=most)


def test_a_state_that_the_checkpoint_lacks_is_named(saved):
    _, checkpoint, _, _ = saved("Lion")
    (problems,) = run_ranks(1, complaints, load_and_train, checkpoint, 1)
    has(only(problems), "no exp_avg_sq", "adamw", "exp_avg", "resume with")
