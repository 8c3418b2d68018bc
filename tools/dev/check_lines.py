"""Check that source and tests are within pyproject.toml's limits: `python tools/dev/check_lines.py`.

Source is megamoe/ and tools/ without tools/dev. A capability that needs more lines raises a limit in its own commit.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megamoe.config import cli
from megamoe.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def count(*patterns: str) -> int:
    """Lines of the Python files that match."""
    return sum(len(path.read_text().splitlines()) for pattern in patterns for path in ROOT.glob(pattern))


def main() -> None:
    argparse.ArgumentParser(description="Check that source and tests are within pyproject.toml's limits.").parse_args()
    limits = re.findall(r"^max_(\w+)_lines = (\d+)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    counts = {"source": count("megamoe/**/*.py", "tools/*.py"), "test": count("tests/**/*.py")}
    said = ", ".join(f"{counts[kind]:,} lines of {kind} (at most {int(limit):,})" for kind, limit in limits)
    if any(counts[kind] > int(limit) for kind, limit in limits):
        raise UserError(f"there are {said}; shorten them, or raise the limit in pyproject.toml for a new capability.")
    print(said)


if __name__ == "__main__":
    cli.run(main)
