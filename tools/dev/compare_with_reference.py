"""Compare a run with a curve of losses that was logged elsewhere:
`python tools/dev/compare_with_reference.py runs/mine --reference CURVE.tsv --out picture.png`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from megamoe.commands.report import read_run
from megamoe.config import cli
from megamoe.monitoring.curves import draw
from megamoe.utils.errors import UserError, shown
from megamoe.utils.json_files import read_regular


def read_reference(path: Path) -> dict[int, float]:
    """Loss by step, from the first two columns of a table with tabs and a line of names. Raises UserError."""
    text = read_regular(path, "a table of step and loss").decode(errors="replace")
    curve: dict[int, float] = {}
    for number, line in enumerate(text.splitlines()[1:], start=2):
        if not line.strip():
            continue
        try:
            step, loss, *_ = line.split("\t")
            curve[int(step)] = float(loss)
        except ValueError:
            raise UserError(
                f"{path}: line {number} is {shown(line)}; give a step, a tab and a loss in each line."
            ) from None
    if not curve or not all(map(math.isfinite, curve.values())):
        raise UserError(f"{path} has no step below its line of names, or a loss that is not finite; give finite ones.")
    return curve


def against_reference(train: list[dict[str, Any]], reference: dict[int, float]) -> str:
    """At how many of the reference's steps that the run has logged its training loss is lower."""
    losses = {row["step"]: row["loss"] for row in train}
    both = [step for step in reference if step in losses]
    not_lower = [step for step in both if losses[step] >= reference[step]]
    line = f"training loss below the reference at {len(both) - len(not_lower)} of the {len(both)} steps that both have"
    return line + (f", not at {', '.join(map(str, not_lower[:10]))}" if not_lower else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=__doc__.partition(":")[0]
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--reference", type=Path, required=True, metavar="TSV", help="its losses: step, loss")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"), help="PNG to draw")
    args = parser.parse_args()
    if args.out.suffix != ".png":
        raise UserError(f"--out is {args.out}; give it a name that ends in .png.")
    run, reference = read_run(args.run_dir), read_reference(args.reference)
    figure, last_step = draw([run]), run.log["train"][-1]["step"]
    loss, reached = figure.axes[0], [step for step in reference if step <= last_step]
    loss.plot(reached, [reference[step] for step in reached], "k.--", linewidth=1, label="reference")
    loss.legend(frameon=False)
    figure.savefig(args.out, dpi=120)
    print(against_reference(run.log["train"], reference))
    print(f"plot: {args.out}")


if __name__ == "__main__":
    cli.run(main)
