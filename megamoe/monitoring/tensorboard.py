"""A run's values in TensorBoard's files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.monitoring.sink import Sink

if TYPE_CHECKING:
    from torch import Tensor


class TensorBoardSink(Sink):
    """RUN/tensorboard: the scalars, and a histogram of the experts' load for each layer."""

    def open(self, run_dir: Path, first_step: int, record: dict[str, Any]) -> None:
        self._folder = run_dir / "tensorboard"
        self._begin(first_step)

    def _begin(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self._folder), purge_step=first_step + 1 if first_step else None)

    def go_back(self, step: int) -> None:
        self.close()
        self._begin(step)

    def log_scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{key}", value, step)
            elif isinstance(value, dict):  # by block
                for block, inner in value.items():
                    self._board.add_scalar(f"{key}/layer_{int(block):02d}", inner, step)

    def log_text(self, step: int, text: str) -> None:
        self._board.add_text("run", text, step)

    def log_expert_loads(self, step: int, blocks: list[int], counts: Tensor) -> None:
        limits = [expert + 0.5 for expert in range(counts.shape[1])]
        for layer, row in zip(blocks, counts.tolist(), strict=True):
            self._board.add_histogram_raw(
                f"expert_load/layer_{layer:02d}",
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
