"""A model, a corpus and a DeepSpeed configuration small enough for tests of whole runs."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from corpora import build
from ranks import run_ranks
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from megamoe.config.precision import by_rates
from megamoe.config.recipe import Recipe, parse_recipe, read_recipe
from megamoe.config.run import RunConfig
from megamoe.launch.determinism import make_deterministic
from megamoe.launch.distributed import raise_on_any_rank, this_device
from megamoe.launch.stopping import StopRequest
from megamoe.launch.watch import Position
from megamoe.monitoring.log_files import read_log
from megamoe.pretrain import check_run
from megamoe.pretrain import run as pretrain
from megamoe.run_inputs import Checked
from megamoe.utils.data_sheets import Device
from megamoe.utils.errors import Problems

PRESET = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_latent_tokens": 3,
    "max_position_embeddings": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
# Of a device that "auto" computes in bf16 on, whatever this one is.
PRECISION = by_rates(1e12, 1e12)
SHIPPED = Path(__file__).parent.parent / "ds_configs"
SLOW = Device("slow", 1e12, 1e12, 1e9, 1e9, inside=1e5, between=1e5, host=1e6, host_memory_rate=1e8)


def shipped(name: str) -> dict[str, Any]:
    """A shipped DeepSpeed JSON, with bf16 for "auto" on any device."""
    return read_recipe(str(SHIPPED / f"{name}.json"), 1, False, "bf16").json


def ds_config(micro_batch: int, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    """The shipped fp32 recipe with a short schedule."""
    ds = shipped("zero2_fp32")
    ds.update(train_micro_batch_size_per_gpu=micro_batch, gradient_accumulation_steps=accumulation)
    ds["scheduler"]["params"].update(warmup_num_steps=4, total_num_steps=40, warmup_max_lr=1e-2)
    return {**ds, **changes}


def ds_of_samples(samples: int, micro_batch: int | None = None) -> dict[str, Any]:
    """The same with so many samples per step on any number of ranks."""
    ds = {**ds_config(1), "train_batch_size": samples, "train_micro_batch_size_per_gpu": micro_batch}
    del ds["gradient_accumulation_steps"]
    return {key: value for key, value in ds.items() if value is not None}


def recipe_of(ds: dict[str, Any], ranks: int = 1) -> Recipe:
    """A DeepSpeed JSON as the engine and the planner take it."""
    return parse_recipe(ds, "ds.json", ranks, False, "bf16")


def write_inputs(
    folder: Path, ds: dict[str, Any], preset: dict[str, Any] | None = None, item: int | None = None
) -> dict[str, Any]:
    """Write corpus, preset and DeepSpeed JSON below `folder`; returns the fields of a RunConfig that uses them.

    Args:
        item: tokens of a document; None makes one of all.
    """
    draw = np.random.default_rng(0)
    corpus = folder / "corpus"
    if not corpus.exists():
        corpus.mkdir(parents=True)
        for split, tokens in (("train", 6000), ("valid", 600)):
            build(
                corpus / split,
                np.cumsum(draw.integers(0, 4, tokens)) % PRESET["vocab_size"],
                np.int16,
                item=item or tokens,
            )
    (folder / "preset.json").write_text(json.dumps({**PRESET, **(preset or {})}))
    (folder / "ds.json").write_text(json.dumps(ds))
    return {
        "ds_config": str(folder / "ds.json"),
        "preset": str(folder / "preset.json"),
        "data": [str(corpus)],
        "log_interval": 1,
    }


def write_phases(folder: Path, *stages: tuple[int, int | None], **last: Any) -> str:
    """A schedule of phases of (samples per step, steps); returns its path.

    Args:
        last: further settings of the last one.
    """
    phases = [{"samples_per_step": samples, "tokens": steps and samples * steps * 16} for samples, steps in stages]
    phases[-1] |= last
    (folder / "phases.json").write_text(json.dumps({"phases": phases}))
    return str(folder / "phases.json")


def new_store(purpose: str) -> Store:
    """A store for the ranks of the group that exists already, as the rendezvous gives one to a run; each call gives
    another."""
    store = _get_default_store()
    return PrefixStore(f"{purpose}/{store.add(f'{purpose}/{dist.get_rank()}', 1)}", store)


def check(run: dict[str, Any], world_size: int = 1) -> Checked:
    """The checks of pretrain.py for so many ranks, without ranks. Raises UserError."""
    return check_run(RunConfig(**run), world_size, torch.device("cpu"), PRECISION)


def check_here(run: dict[str, Any]) -> Checked:
    """The checks of pretrain.py, on this rank of a group that exists already. Raises UserError."""
    return check_run(RunConfig(**run), dist.get_world_size(), this_device(), PRECISION, dist.get_rank() == 0)


def begin(checked: Checked) -> None:
    """Record the start in the run folder, as a run does before its first step."""
    assert checked.start.folder
    checked.start.folder.enter(checked.record, checked.inputs.tokenizer_files)


def train_here(run: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Train as pretrain.py does, on this rank of a group that exists already; returns the log. Exits with problems."""
    if run.get("deterministic"):
        make_deterministic()
    problems = Problems()
    checked = problems.attempt(check_here, run)
    raise_on_any_rank(problems)
    pretrain(checked, new_store("run"), Position(), StopRequest())
    dist.barrier()
    return read_log(checked.run.folder)


def heard(function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """What the function returns, or the code it exits with, and what it prints on this rank."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            result = function(*args)
        except SystemExit as end:
            result = end.code
    return result, out.getvalue()


def run_and_hear(ranks: int, function: Callable[..., Any], *args: Any) -> tuple[list[Any], str]:
    """The results of all ranks, and what they print."""
    results, said = zip(*run_ranks(ranks, heard, function, *args), strict=True)
    return list(results), "".join(said)


def losses(log: dict[str, list[dict[str, Any]]]) -> list[float]:
    """The training losses of a log, step by step."""
    return [record["loss"] for record in log["train"]]
