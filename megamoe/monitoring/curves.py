"""One picture of a run, or of several: loss, balance, learning rate and speed."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megamoe.monitoring.evaluations import description, further_sets, points, task_values
from megamoe.monitoring.run_state import RunState

TITLES = {"L": "loss (nats per token)", "B": "running MaxVio", "R": "learning rate", "S": "tokens/s", "T": "tasks"}
KEYS = {"B": "running_max_vio", "R": "lr", "S": "tokens_per_second"}
RESTARTS = {"resume": ":", "rollback": "-."}
STYLE = dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
DARKEST = 1.0  # MaxVio of a layer, so that the healthy range, below 0.2, can be told apart


def draw(runs: list[RunState]) -> Figure:
    """Curves over the steps of one run, with the balance of its layers, or of several over their tokens, where all of
    them log these. The axes of the loss come first."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    several, has_tasks = len(runs) > 1, any(task_values(run.log["valid"]) for run in runs)
    by_tokens = several and all("total_tokens" in row for run in runs for row in run.log["train"])
    with pyplot.style.context(["tableau-colorblind10", STYLE, {"axes.grid": True, "grid.alpha": 0.3, "font.size": 9}]):
        figure, panels = pyplot.subplot_mosaic(
            "LB;LR;LS" + ";TT" * has_tasks, figsize=(11, 6 + 2 * has_tasks), width_ratios=(3, 2), sharex=True,
            layout="constrained",
        )  # fmt: skip
        for number, run in enumerate(runs):
            at = [(row["step"], row["total_tokens" if by_tokens else "step"]) for row in run.log["train"]]
            _draw_run(panels, run, np.transpose([(0, 0), *at]), f"C{number}" if several else None)
        if not several:
            _draw_restarts(panels["L"], runs[0])
            _draw_layers(panels["B"], runs[0])
        for name, axes in panels.items():
            axes.set_title(TITLES[name], loc="left")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if name in "BR":
                axes.tick_params(labelbottom=False)
            else:
                axes.set_xlabel("tokens" if by_tokens else "step")
            if name in "LT":
                axes.legend()
        panels["R"].yaxis.set_major_formatter("{x:g}")
        panels["S"].yaxis.set_major_formatter(EngFormatter(sep=""))
        panels["S"].set_ylim(bottom=0)
        _draw_bits(panels["L"], runs)
    return figure


def _draw_run(panels: dict[str, Any], run: RunState, at: np.ndarray, color: str | None) -> None:
    """What pictures of one and of several runs have.

    Args:
        at: (2, N) steps and where they stand.
        color: of the run; None where it is alone, and its curves have colors of their own.
    """
    train, valid = run.log["train"], run.log["valid"]
    curves = [(panel, train, key, "", "-") for panel, key in KEYS.items()]
    if color:  # training faint, next to held out
        curves += [("L", train, "loss", "" if run.held_out else run.name, "-"), ("L", valid, "loss", run.name, "o-")]
    else:
        sets = ("", *further_sets(valid))
        curves += [("L", train, "loss", "training", "-")]
        curves += [("L", valid, f"{one}_loss".lstrip("_"), f"held out{description(one)}", "o-") for one in sets]
    curves += [("T", valid, key, f"{run.name} {key}" if color else key, "o-") for key in task_values(valid)]
    for panel, rows, key, label, line in curves:
        steps, values = points(rows, key)
        if steps:
            faint = 0.4 if color and panel == "L" and rows is train else 1
            x = np.interp(steps, *at)
            panels[panel].plot(x, values, line, color=color, label=label or "_", alpha=faint, markersize=4)


def _draw_restarts(axes: Any, run: RunState) -> None:
    for kind, line in RESTARTS.items():
        if steps := [event["step"] for event in run.events if event["event"] == kind]:
            axes.vlines(steps, 0, 1, "0.4", line, transform=axes.get_xaxis_transform(), label=kind)


def _draw_layers(axes: Any, run: RunState) -> None:
    """A map of layers and steps in the place of the curve, where the log has them."""
    key = "running_max_vio_by_block"
    found = [(row["step"], row[key]) for row in run.log["train"] if row.get(key)]
    if found:
        steps, layers = [step for step, _ in found], [*found[-1][1]]
        axes.clear()
        axes.grid(visible=False)
        values = [[values.get(layer, np.nan) for _, values in found] for layer in layers]
        drawn = axes.pcolormesh(steps, [*map(int, layers)], values, cmap="magma_r", vmin=0, vmax=DARKEST)
        axes.figure.colorbar(drawn, ax=axes, extend="max", pad=0.01)
        axes.set_ylabel("layer")
        axes.yaxis.get_major_locator().set_params(integer=True)


def _draw_bits(axes: Any, runs: list[RunState]) -> None:
    """A second scale, where a token of all held-out sets is as many bytes."""
    rows = [row for run in runs for row in run.held_out if "bits_per_byte" in row]
    ratios = {round(row["bits_per_byte"] / row["loss"], 4) for row in rows}
    if len(ratios) == 1:
        ratio = ratios.pop()
        axes.secondary_yaxis("right", functions=(lambda nats: nats * ratio, lambda bits: bits / ratio))
        axes.set_title("held-out bits per byte", loc="right")
