"""The C++ compiler of this host, with which DeepSpeed's operators and torch's compiled regions are made."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

SOURCE = '#include <Python.h>\nextern "C" int three() { return 3; }\n'
MOST_SECONDS = 60


def compiler_problem() -> str | None:
    """What keeps this host from compiling a library of three lines for Python, with the remedy; None where it can."""
    compiler = os.environ.get("CXX") or "c++"  # as torch takes it
    include = sysconfig.get_path("include")
    if not shutil.which(shlex.split(compiler)[0]):
        return f"there is no C++ compiler {compiler}; install one (Debian, Ubuntu: apt install g++), or set CXX."
    if not Path(include, "Python.h").exists():
        return f"there is no {include}/Python.h; install Python's headers (Debian, Ubuntu: apt install python3-dev)."
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "three.so")
        words = [*shlex.split(compiler), "-x", "c++", "-", f"-I{include}", "-shared", "-fPIC", "-o", str(library)]
        try:
            done = subprocess.run(words, input=SOURCE, capture_output=True, text=True, timeout=MOST_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"the C++ compiler {compiler} does not run ({error}); reinstall it, or set CXX to another."
        if done.returncode or not library.exists():
            why = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
            return f"the C++ compiler {compiler} compiles nothing ({why}); reinstall it, or set CXX to another."
    return None
