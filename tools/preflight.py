#!/usr/bin/env python3
"""Check the hosts of a job before ranks are started on them: `python tools/preflight.py hostfile HOSTFILE -- ...`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # for a Python without megamoe

from megamoe.launch.versions import requirement_problems

if __name__ == "__main__":
    if lacks := requirement_problems(ROOT / "pyproject.toml"):
        print("\n".join(f"error: {problem}" for problem in lacks), file=sys.stderr)
        sys.exit(2)
    from megamoe.commands.preflight import main
    from megamoe.config import cli

    cli.run(main)
