"""Weights & Biases and trackio, whose packages have one API. What is superseded cannot be taken back there."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megamoe.monitoring.names import EXPERT_LOAD, SAMPLES, TEXT, flat_config, layer, named
from megamoe.monitoring.sink import Sample, Sink
from megamoe.utils.errors import first_line

if TYPE_CHECKING:
    from torch import Tensor

STEP = "trainer/global_step"  # W&B's own step only rises
START_SECONDS, FINISH_SECONDS = 60, 20  # for W&B's server to answer, and to take what is left


class _WandbApiSink(Sink):
    _package: Any
    _run: Any

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(values, step=step)

    def log_scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._log(step, named(kind, values))

    def log_text(self, step: int, text: str) -> None:
        self._log(step, {TEXT: text})

    def log_expert_loads(self, step: int, blocks: list[int], counts: Tensor) -> None:
        edges = np.arange(counts.shape[1] + 1) - 0.5
        loads = zip(blocks, counts.numpy(), strict=True)
        self._log(step, {layer(EXPERT_LOAD, b): self._package.Histogram(np_histogram=(row, edges)) for b, row in loads})

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        table = self._package.Table(columns=list(Sample._fields), data=[list(sample) for sample in samples])
        self._log(step, {SAMPLES: table})

    def close(self) -> None:
        self._run.finish()


class WandbSink(_WandbApiSink):
    """A run of Weights & Biases, with its files in RUN/wandb. Without an API key, or a server that answers, it is an
    offline one, for `wandb sync`."""

    def __init__(self, project: str | None = None, group: str | None = None, team: str | None = None):
        project = project or os.environ.get("WANDB_PROJECT", "megamoe")
        self._place: dict[str, Any] = {"project": project, "group": group, "entity": team}

    def open(self, run_dir: Path, first_step: int, record: dict[str, Any]) -> None:
        import wandb

        self._package = wandb
        settings = wandb.Settings(
            quiet=True, console="off", init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS,
            x_disable_meta=True,  # it would send the command line, which may hold a password
        )  # fmt: skip
        begin = partial(
            wandb.init, dir=str(run_dir), id=record["run_id"], resume="allow", name=run_dir.name,
            config=flat_config(record), settings=settings, **self._place,
        )  # fmt: skip
        has_key = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
        try:
            self._run = begin() if has_key else begin(mode="offline")
        except wandb.Error as error:
            print(f"warning: W&B failed ({first_line(error)}); it goes on offline.", file=sys.stderr, flush=True)
            wandb.teardown()  # frees the id
            self._run = begin(mode="offline")
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({STEP: step, **values})


class TrackioSink(_WandbApiSink):
    """A run of trackio, where its environment variables say: a folder of the user's, a server or a Space."""

    def open(self, run_dir: Path, first_step: int, record: dict[str, Any]) -> None:
        import trackio

        self._package = trackio
        name = f"{run_dir.name}-{record['run_id'][:8]}"  # by which alone it finds the run again
        project = os.environ.get("TRACKIO_PROJECT", "megamoe")
        self._run = trackio.init(project, name=name, resume="allow", config=flat_config(record))
