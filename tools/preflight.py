#!/usr/bin/env python3
"""Check the hosts of a job before ranks are started on them: `python tools/preflight.py hostfile HOSTFILE -- ...`."""

import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # for a Python without megamoe

from megamoe.launch.versions import absent_packages

if __name__ == "__main__":
    if absent := absent_packages(ROOT / "pyproject.toml"):
        why = f"{socket.gethostname()} has no {', '.join(absent)} for {sys.executable}"
        print(f"error: {why}; install megamoe there, or activate its environment.", file=sys.stderr)
        sys.exit(2)
    from megamoe.__main__ import main

    main("preflight")
