"""What a run says: speed, share of the peak, memory, and the three sinks (console line, JSON lines, TensorBoard)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


class Sinks:
    """Writes what the loop reports to the console, RUN/log.jsonl and RUN/tensorboard. Exists on rank 0 only."""

    def __init__(self, run_dir: Path, first_step: int = 0):
        """
        Args:
            first_step: the step that a resumed run goes on from; TensorBoard drops what was logged after it.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._jsonl: IO[str] = open(run_dir / "log.jsonl", "a+", encoding="utf-8")  # noqa: SIM115 (open until close)
        self._end_torn_line()
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def step(self, record: dict[str, Any], seconds_left: float) -> None:
        """One logged training step. `record` has step, loss, lr, tokens_per_second, mfu, max_vio, running_max_vio,
        worst_running_max_vio, grad_norm, memory_gib and skipped_steps."""
        skipped = f" skipped={record['skipped_steps']}" if record["skipped_steps"] else ""
        print(
            f"step={record['step']} avg_loss={record['loss']:.4f} lr={record['lr']:.6g} "
            f"tok/s={record['tokens_per_second']:.0f} mfu={record['mfu']:.1%} "
            f"max_vio={record['max_vio']:.2f} running_max_vio={record['running_max_vio']:.2f} "
            f"grad_norm={record['grad_norm']:.2f} mem={record['memory_gib']:.2f}GiB "
            f"left={duration(seconds_left)}{skipped}",
            flush=True,
        )
        self._write("train", record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """One evaluation. `record` has step, loss, tokens and, where the corpus' bytes are known, bits_per_byte."""
        bits = f" bits_per_byte={record['bits_per_byte']:.4f}" if "bits_per_byte" in record else ""
        print(f"step={record['step']} valid_loss={record['loss']:.4f}{bits} tokens={record['tokens']}", flush=True)
        self._write("valid", record)

    def expert_loads(self, step: int, counts: Tensor) -> None:
        """Histograms over expert ids, one per layer, of `counts` (L, E) slots."""
        limits = [expert + 0.5 for expert in range(counts.shape[1])]
        for layer, row in enumerate(counts.cpu().double()):
            ids = torch.arange(len(row), dtype=torch.float64)
            self._board.add_histogram_raw(
                f"expert_load/layer_{layer:02d}",
                min=0.0,
                max=float(len(row) - 1),
                num=float(row.sum()),
                sum=float((row * ids).sum()),
                sum_squares=float((row * ids**2).sum()),
                bucket_limits=limits,
                bucket_counts=row.tolist(),
                global_step=step,
            )

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        # JSON has no NaN and no infinity, which a skipped step brings.
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in record.items()}  # fmt: skip
        self._jsonl.write(json.dumps({"kind": kind, **finite}) + "\n")
        self._jsonl.flush()
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{key}", value, record["step"])

    def _end_torn_line(self) -> None:
        """A run that was killed while writing leaves half a line; the next record must not be glued to it."""
        self._jsonl.seek(0)
        text = self._jsonl.read()
        if text and not text.endswith("\n"):
            self._jsonl.write("\n")

    def close(self) -> None:
        self._jsonl.close()
        self._board.close()


def read_log(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of RUN/log.jsonl by kind ("train", "valid"), without those that a resumed run left behind."""
    records: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "valid": {}}
    for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn when the run was killed
        kind, step = record.pop("kind"), record["step"]
        if kind == "train":  # steps only rise, until a resume goes back
            for by_step in records.values():
                for later in [logged for logged in by_step if logged > step]:
                    del by_step[later]
        records[kind][step] = {key: math.nan if value is None else value for key, value in record.items()}
    return {kind: [by_step[step] for step in sorted(by_step)] for kind, by_step in records.items()}
