"""A run's values as lines of text."""

from __future__ import annotations

from typing import Any

from megamoe.monitoring.sink import Sample, Sink
from megamoe.utils.text import duration


class ConsoleSink(Sink):
    """A line per logged step, evaluation or text."""

    def log_scalars(self, kind: str, step: int, values: dict[str, Any]) -> None:
        _print({"train": _train_line, "valid": _valid_line}[kind](step, values))

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        for prompt, continuation in samples:
            _print(f"[sample after step {step}] {prompt}{continuation}")

    def log_text(self, step: int, text: str) -> None:
        _print(text)


def _print(line: str) -> None:
    print(line + "\n", end="", flush=True)  # in one piece: trackers print from threads of their own


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
