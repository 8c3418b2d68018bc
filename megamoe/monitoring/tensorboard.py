"""A run's values in TensorBoard's files."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from megamoe.monitoring.names import EXPERT_LOAD, SAMPLES, TEXT, flat_config, layer, named
from megamoe.monitoring.sink import Sample, Sink

if TYPE_CHECKING:
    from torch import Tensor

CODE = "    "  # begins a line of Markdown that is shown as it is


class TensorBoardSink(Sink):
    """RUN/tensorboard: the scalars, a histogram of the experts' load for each layer, text, and the configuration, as
    text and as a row of the table of runs."""

    def __init__(self, folder: Path):
        self._folder = folder

    def open(self, run_dir: Path, first_step: int, record: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        self._begin(first_step)
        config = flat_config(record)
        self._board.add_text("run/config", indent(json.dumps(config, indent=2), CODE), first_step)
        # The first two of its three summaries; add_hparams would make a run of its own.
        for summary in hparams(config, {"train/loss": 0.0, "valid/loss": 0.0})[:2]:
            self._board._get_file_writer().add_summary(summary)

    def _begin(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Each writer but the first purges what is superseded, and the last seconds are lost where a rank dies.
        self._board = SummaryWriter(str(self._folder), purge_step=first_step + 1, flush_secs=15)

    def go_back(self, step: int) -> None:
        self.close()
        self._begin(step)

    def log_scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        for name, value in named(kind, values).items():
            self._board.add_scalar(name, value, step)

    def log_text(self, step: int, text: str) -> None:
        self._board.add_text(TEXT, text, step)

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        texts = (indent(prompt + continuation, CODE) for prompt, continuation in samples)
        self._board.add_text(SAMPLES, "\n\n---\n\n".join(texts), step)

    def log_expert_loads(self, step: int, blocks: list[int], counts: Tensor) -> None:
        limits = [expert + 0.5 for expert in range(counts.shape[1])]
        for block, row in zip(blocks, counts.tolist(), strict=True):
            self._board.add_histogram_raw(
                layer(EXPERT_LOAD, block),
                min=0.0,
                max=float(len(row) - 1),
                num=float(sum(row)),
                sum=float(sum(expert * load for expert, load in enumerate(row))),
                sum_squares=float(sum(expert**2 * load for expert, load in enumerate(row))),
                bucket_limits=limits,
                bucket_counts=row,
                global_step=step,
            )

    def close(self) -> None:
        self._board.close()
