"""Write what `make gpu` has measured into docs/results/performance.md, between its two marks.

python tools/dev/gpu_table.py                 from docs/results/gpu-*.json; `make gpu` calls it at its end
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Any

from benchmark import TURNS, table_of_profiles, table_of_sizes

from megamoe.config import cli
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import read_json

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/results/performance.md"
BEGIN, END = "<!-- begin of tools/dev/gpu_table.py -->", "<!-- end of tools/dev/gpu_table.py -->"
NOTHING = "Not yet measured: `make gpu`."


def write_table(page: Path, results: Path) -> None:
    """Replace what stands between the marks. Raises UserError where they are missing."""
    text = page.read_text()
    if not re.search(f"{BEGIN}.*{END}", text, re.DOTALL):
        raise UserError(f"{page} has no lines {BEGIN} and {END}; put them where the table shall be.")
    files = sorted(results.glob("gpu-*.json"))
    tables = [f"{describe(read_json(file), file.name)}\n" for file in files] or [f"{NOTHING}\n"]
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text("\n".join([f"{head}{BEGIN}", *tables, f"{END}{tail}"]))


def describe(result: dict[str, Any], name: str) -> str:
    """One file of results: a paragraph and two tables."""
    device, versions = result["device"], result["versions"]
    counts = Counter(check["result"].partition(":")[0] for check in result["checks"])
    checks = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "not run") if counts[kind])
    speed = {name: one for name, one in result["speed"].items() if one["turns"]}
    facts = ", ".join(f"{key} {versions[key]}" for key in ("megamoe", "torch", "deepspeed"))
    failed = [*result.get("failures", {}), *(name for name, one in result["speed"].items() if one["failure"])]
    failures = "".join(f" {name} failed." for name in failed)
    parts = [
        f"**{device['count']} x {device['name']}**, driver {device['driver']}, CUDA {device['cuda']}, {facts}, "
        f"{result['date']}; checks: {checks}.{failures} All of it is in `docs/results/{name}`."
    ]
    if speed:
        names, turns = list(speed), [TURNS.validate_python(one["turns"]) for one in speed.values()]
        ends = [one["out_of_memory_at_tokens"] for one in speed.values()]
        parts += [table_of_sizes(names, turns, ends), table_of_profiles(names, turns)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Write the results of make gpu into docs/results/performance.md.",
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="file with the two marks")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results", help="folder with gpu-*.json")
    args = parser.parse_args()
    write_table(args.page, args.results)


if __name__ == "__main__":
    cli.run(main)
