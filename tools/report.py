"""Show what a run has done: `python tools/report.py runs/tiny` prints its losses and draws RUN/loss_lr.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from megamoe import cli
from megamoe.errors import UserError
from megamoe.training.sinks import read_log

ROWS = 16  # of the loss table, at most


def loss_table(log: dict[str, list[dict[str, Any]]]) -> str:
    """Step, training loss, held-out loss, learning rate and balance, evenly spaced over the run."""
    train = log["train"]
    every = -(-len(train) // ROWS)
    rows = train[::-1][::every][::-1]  # counted from the end, so that the last step is there
    valid = {record["step"]: record for record in log["valid"]}
    lines = [f"{'step':>7} {'loss':>8} {'valid':>8} {'bits/byte':>9} {'lr':>11} {'MaxVio':>7} {'tok/s':>8}"]
    for row in rows:
        held_out = valid.get(row["step"], {})
        lines.append(
            f"{row['step']:>7} {row['loss']:>8.4f} {_cell(held_out.get('loss')):>8} "
            f"{_cell(held_out.get('bits_per_byte')):>9} {row['lr']:>11.6g} {row['running_max_vio']:>7.2f} "
            f"{row['tokens_per_second']:>8.0f}"
        )
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def draw(log: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss, learning rate and expert balance over the steps, as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    train, valid = log["train"], log["valid"]
    steps = [row["step"] for row in train]
    figure, (loss, rate, balance) = pyplot.subplots(3, 1, sharex=True, figsize=(8, 9), layout="constrained")
    loss.plot(steps, [row["loss"] for row in train], label="training")
    if valid:
        loss.plot([row["step"] for row in valid], [row["loss"] for row in valid], "o-", label="held out")
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    rate.plot(steps, [row["lr"] for row in train], color="tab:green")
    rate.set_ylabel("learning rate")
    balance.plot(steps, [row["max_vio"] for row in train], alpha=0.5, label="step")
    balance.plot(steps, [row["running_max_vio"] for row in train], label="running, mean of layers")
    balance.plot(steps, [row["worst_running_max_vio"] for row in train], ":", label="running, worst layer")
    balance.set_ylabel("MaxVio (0 is balanced)")
    balance.set_ylim(bottom=0)
    balance.set_xlabel("step")
    balance.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = cli.Parser(description="Print a run's losses and draw loss_lr.png.")
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    run_dir = parser.parse().run_dir
    if not (run_dir / "log.jsonl").is_file():
        raise UserError(f"{run_dir} holds no log.jsonl; give the folder of a run.")
    log = read_log(run_dir)
    if not log["train"]:
        raise UserError(f"{run_dir}/log.jsonl holds no step yet; wait for the first one.")
    draw(log, run_dir / "loss_lr.png")
    print(loss_table(log))
    if log["valid"]:
        last = log["valid"][-1]
        bits = f", {last['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in last else ""
        print(f"validation at step {last['step']}: {last['loss']:.4f} nats per token{bits}")
    for what, place in (
        ("checkpoints", "checkpoints"),
        ("plot", "loss_lr.png"),
        ("log", "log.jsonl"),
        ("TensorBoard", "tensorboard"),
        ("configuration", "run.json"),
    ):
        print(f"{what:>14}: {run_dir / place}")


if __name__ == "__main__":
    cli.run(main)
