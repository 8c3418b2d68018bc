"""Where a run's values go: console, JSON lines, TensorBoard. One class per sink, listed in `SINKS`.

Logs are expendable: a sink that fails is named once on stderr, and training continues. It is given what follows, of
which TensorBoard writes nothing until the run resumes.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `megamoe status` reads a log without it
    from torch import Tensor


class Sink:
    """What a sink can take; each method does nothing unless a sink overrides it. Sinks exist on rank 0 only."""

    def open(self, run_dir: Path, first_step: int) -> None:
        """Begin to write.

        Args:
            first_step: the step that the run continues from; what was logged after it is superseded.
        """

    def log_scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Numbers by name: of a logged training step (kind "train", see `StepMetrics.values`) or of an evaluation
        (kind "valid": loss, tokens and, where the corpus' bytes are known, bits_per_byte of the first held-out set,
        NAME_loss and NAME_bits_per_byte of the others; the same of the averaged weights, where a run keeps them, behind
        ema_; TASK_METRIC. An evaluation need not have all.)"""

    def log_text(self, step: int, text: str) -> None:
        """A line about the run itself."""

    def log_expert_loads(self, step: int, blocks: list[int], counts: Tensor) -> None:
        """Slots that a step routed to each expert, over all ranks.

        Args:
            blocks: the L blocks that have experts, by number from 0.
            counts: (L, E) int64.
        """

    def log_event(self, values: dict[str, Any]) -> None:
        """What the guard has met: "event", "step" and what belongs to it, see docs/reference/guard.md."""

    def close(self) -> None:
        """Write what is left."""


class ConsoleSink(Sink):
    """A line per logged step, evaluation or text."""

    def log_scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        print({"train": _train_line, "valid": _valid_line}[kind](step, values), flush=True)

    def log_text(self, step: int, text: str) -> None:
        print(text, flush=True)


def _train_line(step: int, values: dict[str, Any]) -> str:
    counts = {"skipped": "skipped_steps", "guarded": "guarded_steps", "rollbacks": "rollbacks"}
    skipped = "".join(f" {word}={values[name]}" for word, name in counts.items() if values.get(name))
    batch = f"batch={values['batch_size']} " if "batch_size" in values else ""
    parts = [f"{name.removesuffix('_loss')}={value:.4g} " for name, value in values.items() if name.endswith("_loss")]
    return (
        f"step={step} avg_loss={values['loss']:.4f} {''.join(parts)}lr={values['lr']:.6g} {batch}"
        f"tok/s={values['tokens_per_second']:.0f} mfu={values['mfu']:.1%} "
        f"max_vio={values['max_vio']:.2f} running_max_vio={values['running_max_vio']:.2f} "
        f"grad_norm={values['grad_norm']:.2f} mem={values['memory_gib']:.2f}GiB "
        f"left={duration(values['seconds_left'])}{skipped}"
    )


def _valid_line(step: int, values: dict[str, Any]) -> str:
    first = [name for name in ("loss", "bits_per_byte", "tokens") if name in values]  # of the first held-out set
    labels = {name: "valid_loss" if name == "loss" else name for name in (*first, *values)}
    shown = (f"{label}={values[name]:{'' if name == 'tokens' else '.4f'}}" for name, label in labels.items())
    return f"step={step} {' '.join(shown)}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


class JsonLinesSink(Sink):
    """RUN/log.jsonl, every number unrounded, and RUN/guard.jsonl, which is made by the first event: a record per line.
    `read_log` reads the first back."""

    def open(self, run_dir: Path, first_step: int) -> None:
        self._run_dir = run_dir

    def log_scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        _append(self._run_dir / "log.jsonl", {"kind": kind, "step": step, **values})

    def log_event(self, values: dict[str, Any]) -> None:
        _append(self._run_dir / "guard.jsonl", values)


def _append(path: Path, values: dict[str, Any]) -> None:
    # JSON has no NaN and no infinity, which a skipped step brings.
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
              for key, value in values.items()}  # fmt: skip
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")  # a run that was killed while it wrote has left half a line
        file.write(json.dumps(finite).encode() + b"\n")


class TensorBoardSink(Sink):
    """RUN/tensorboard: the scalars, and a histogram of the experts' load for each layer."""

    def open(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)

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


SINKS: tuple[type[Sink], ...] = (ConsoleSink, JsonLinesSink, TensorBoardSink)


class SinkGroup(Sink):
    """Hands everything to several sinks; one that fails is named once, and never ends the run."""

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = sinks
        self._failed: set[Sink] = set()

    def open(self, run_dir: Path, first_step: int) -> None:
        self._run_dir = run_dir
        self._call_each("open", run_dir, first_step)

    def log_scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._call_each("log_scalars", kind, step, values)

    def log_text(self, step: int, text: str) -> None:
        self._call_each("log_text", step, text)

    def log_expert_loads(self, step: int, blocks: list[int], counts: Tensor) -> None:
        self._call_each("log_expert_loads", step, blocks, counts)

    def log_event(self, values: dict[str, Any]) -> None:
        self._call_each("log_event", values)

    def go_back(self, step: int) -> None:
        """What was logged after `step` is superseded."""
        self._call_each("close")
        self._call_each("open", self._run_dir, step)

    def close(self) -> None:
        self._call_each("close")

    def _call_each(self, method: str, *args: Any) -> None:
        for sink in self._sinks:
            try:
                getattr(sink, method)(*args)
            except Exception as error:  # of whatever library a sink is made of
                if sink not in self._failed:
                    name, why = type(sink).__name__, error or repr(error)
                    print(f"warning: {name} failed ({why}); training continues.", file=sys.stderr, flush=True)
                self._failed.add(sink)


def open_sinks(run_dir: Path, first_step: int) -> SinkGroup:
    """All sinks of a run, open. On rank 0."""
    group = SinkGroup([kind() for kind in SINKS])
    group.open(run_dir, first_step)
    return group


def read_log(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of RUN/log.jsonl by kind ("train", "valid"), without those that a resumed run left behind."""
    records: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "valid": {}}
    newest = 0
    for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn when the run was killed
        kind, step = record.pop("kind"), record["step"]
        if kind == "train" and step < newest:  # steps only rise, until a resume goes back
            for by_step in records.values():
                for later in [logged for logged in by_step if logged > step]:
                    del by_step[later]
        newest = step if kind == "train" else max(newest, step)
        records[kind][step] = {key: math.nan if value is None else value for key, value in record.items()}
    return {kind: [by_step[step] for step in sorted(by_step)] for kind, by_step in records.items()}
