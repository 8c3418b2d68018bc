"""What the runs of tools/dev/ablate.py have come to, as a table and a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

BASELINE = "baseline"  # the runs without a change


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results so far."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measure_of(line: dict[str, Any]) -> float:
    """What runs are compared by: held-out bits per byte, or the loss where the bytes are not known."""
    held_out = line["held_out"]
    return held_out.get("bits_per_byte", held_out.get("loss", line["loss"]))


@dataclass(frozen=True)
class Group:
    """The runs of one change that differ by their seeds."""

    name: str
    lines: list[dict[str, Any]]

    @property
    def size(self) -> tuple[int, int]:
        """Steps and ranks."""
        return self.lines[0]["steps"], self.lines[0]["ranks"]

    @property
    def values(self) -> list[float]:
        return [measure_of(line) for line in self.lines]

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return stdev(self.values) if len(self.values) > 1 else None


def groups_of(lines: list[dict[str, Any]]) -> list[Group]:
    """The runs by change, number of steps and ranks, best first."""
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["name"], line["steps"], line["ranks"]), []).append(line)
    return sorted((Group(key[0], some) for key, some in groups.items()), key=lambda group: mean(group.values))


def table_of(groups: list[Group]) -> str:
    """A line per change: its result, spread over seeds and difference to the baseline of its size."""
    width = max(len(group.name) for group in groups)
    base = {group.size: mean(group.values) for group in groups if group.name == BASELINE}
    rows = [f"{'change':<{width}} {'steps':>6} {'ranks':>5} {'seeds':>5} {'result':>8} {'spread':>7} {'change':>8} "
            f"{'worst':>7} {'MaxVio':>7} {'highest':>7} {'tok/s':>7}"]  # fmt: skip
    for group in groups:
        steps, ranks = group.size
        spread = "" if group.spread is None else f"{group.spread:.4f}"
        difference = f"{mean(group.values) - base[group.size]:+.4f}" if group.size in base else ""
        rows.append(
            f"{group.name:<{width}} {steps:>6} {ranks:>5} {len(group.lines):>5} {mean(group.values):>8.4f} {spread:>7} "
            f"{difference:>8} {max(group.values):>7.4f} {_mean(group, 'running_max_vio'):>7.3f} "
            f"{_mean(group, 'highest_max_vio'):>7.3f} {_mean(group, 'tokens_per_second'):>7.0f}"
        )
    return "\n".join(rows)


def _mean(group: Group, name: str) -> float:
    return mean(line[name] for line in group.lines)


def _size_of(group: Group) -> str:
    steps, ranks = group.size
    return f"{steps} steps" + (f", {ranks} ranks" if ranks > 1 else "")


def draw(groups: list[Group], path: Path) -> None:
    """The result of every change, a dot per seed and a bar over their spread, as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.25 * len(groups)), layout="constrained")
    for row, group in enumerate(groups):
        color = "tab:orange" if group.name == BASELINE else "tab:blue"
        axes.plot(group.values, [row] * len(group.values), "o", color=color, markersize=4)
        if group.spread is not None:
            axes.errorbar(mean(group.values), row, xerr=group.spread, color=color, capsize=3)
        if group.name == BASELINE:
            axes.axvline(mean(group.values), color=color, linewidth=0.8)
    axes.set_yticks(range(len(groups)), [f"{group.name} ({_size_of(group)})" for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("held-out bits per byte, with the standard deviation over seeds")
    figure.savefig(path, dpi=120)
