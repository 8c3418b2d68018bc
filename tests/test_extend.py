"""CONTRIBUTING.md says which files a new preset, optimizer or sink touches: these are made up here, and nothing else is
changed."""

import json

import pytest
from ranks import run_ranks
from refusals import has, only, refusals
from toy import PRESET, ds_config, ds_of_samples, losses, recipe_of, train_here, write_inputs

from megamoe.checkpoint.opening import find_checkpoint, open_source
from megamoe.config import model as config
from megamoe.config import optimizers
from megamoe.config.model import load_preset, preset_names
from megamoe.config.optimizers import OptimizerSpec, Params, StateTensor
from megamoe.monitoring import sinks
from megamoe.monitoring.sink import Sink
from megamoe.planning.footprint import footprint
from megamoe.planning.sharding import read_setup


class SgdParams(Params):
    momentum: float


# torch's own with momentum, which DeepSpeed makes by its name; it counts no steps.
SGD = OptimizerSpec(
    names=("SGD",),
    params=SgdParams,
    state=(StateTensor("momentum_buffer"),),
    counts_steps=False,
)
SGD_JSON = {
    "optimizer": {"type": "SGD", "params": {"momentum": 0.9}},
    "zero_allow_untested_optimizer": True,
}


class FileSink(Sink):
    """A line for each call."""

    def open(self, run_dir, first_step, record):
        self.path = run_dir / "mine.txt"

    def log_scalars(self, kind, step, values):
        with open(self.path, "a") as file:
            file.write(f"{kind} {step} {values['loss']:.4f}\n")


def extend(patch, folder):
    """What a contributor would add: a JSON file, an entry, a class."""
    presets = folder / "presets"
    presets.mkdir(exist_ok=True)
    if not (presets / "made-up.json").exists():  # or one rank would read what another is writing
        (presets / "made-up.json").write_text(json.dumps(PRESET))
    patch.setattr(config, "PRESET_DIR", presets)
    patch.setattr(optimizers, "OPTIMIZERS", [*optimizers.OPTIMIZERS, SGD])
    patch.setattr(sinks, "SINKS", (*sinks.SINKS, FileSink))


def train_extended(folder, run):
    with pytest.MonkeyPatch.context() as patch:
        extend(patch, folder)
        return train_here(run)


def test_a_preset_is_a_file_an_optimizer_an_entry_and_a_sink_a_class(tmp_path, monkeypatch):
    run = {**write_inputs(tmp_path, {**ds_of_samples(4), **SGD_JSON}), "preset": "made-up"}
    whole, cut = ({**run, "run_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    (expected,) = run_ranks(1, train_extended, tmp_path, {**whole, "steps": 8})
    run_ranks(1, train_extended, tmp_path, {**cut, "steps": 5})
    log, _ = run_ranks(2, train_extended, tmp_path, {**cut, "steps": 8, "ep_size": 2, "resume": True})
    assert losses(log) == pytest.approx(losses(expected), abs=1e-5)
    lines = (tmp_path / "whole" / "mine.txt").read_text().splitlines()
    assert lines[:2] == [f"train {step} {losses(expected)[step - 1]:.4f}" for step in (1, 2)]
    assert lines[-1].startswith("valid 8 ")

    extend(monkeypatch, tmp_path)
    assert preset_names() == ["made-up"]
    source = open_source(find_checkpoint(tmp_path / "cut"))
    assert (source.state_names, source.training_state()["optimizer_step"]) == (("momentum_buffer",), None)
    setup = read_setup(load_preset("made-up"), recipe_of(ds_config(2, **SGD_JSON)), 1, 16, True)
    state = footprint(setup).between
    assert state["optimizer state"] == state["fp32 masters"]  # one tensor in fp32
    betas = {"type": "SGD", "params": {"momentum": 0.9, "betas": [0.9, 0.9]}}
    has(only(refusals(recipe_of, ds_config(2, optimizer=betas))), "optimizer.params", '"betas"')
