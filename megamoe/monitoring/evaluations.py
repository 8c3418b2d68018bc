"""What the evaluations in the log of a run say."""

from __future__ import annotations

from collections.abc import Iterator

from megamoe.monitoring.log_files import Rows


def further_sets(valid: Rows) -> list[str]:
    """Names of the held-out sets after the first, in their order."""
    return list(dict.fromkeys(key.removesuffix("_loss") for row in valid for key in row if key.endswith("_loss")))


def description(name: str) -> str:
    """Which values a set's name stands for, as the end of a phrase; "" is the first set."""
    is_averaged = name == "ema" or name.startswith("ema_")
    name = name[len("ema_") :] if is_averaged else name
    return (f" on {name}" if name else "") + (" with averaged weights" if is_averaged else "")


def task_values(valid: Rows) -> list[str]:
    """Names of the values of tasks."""
    sets = further_sets(valid)
    others = {"kind", "step", "loss", "tokens", "bits_per_byte"}
    others |= {f"{name}_{value}" for name in sets for value in ("loss", "bits_per_byte")}
    return list(dict.fromkeys(key for row in valid for key in row if key not in others))


def points(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of those rows that have one."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]


def results(valid: Rows) -> Iterator[str]:
    """The last evaluation of each held-out set, and of the tasks."""
    for name in ("", *further_sets(valid)):
        prefix = f"{name}_" if name else ""
        last = next((row for row in reversed(valid) if f"{prefix}loss" in row), None)
        if last:
            bits = f", {last[f'{prefix}bits_per_byte']:.4f} bits per byte" if f"{prefix}bits_per_byte" in last else ""
            loss = f"{last[f'{prefix}loss']:.4f} nats per token{bits}"
            yield f"validation{description(name)} at step {last['step']}: {loss}"
    for key in task_values(valid):
        steps, values = points(valid, key)
        yield f"{key} at step {steps[-1]}: {values[-1]:.4f}"
