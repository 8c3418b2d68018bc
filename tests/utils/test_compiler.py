"""Whether this host can compile."""

import subprocess
import sysconfig
from pathlib import Path

import pytest
from refusals import has

from megamoe.utils.compiler import compiler_problem


@pytest.mark.parametrize(
    ("compiler", "parts"),
    [
        ("/none/c++ -O2", ("no C++ compiler /none/c++ -O2; install one", "set CXX.")),
        (
            "/bin/false",
            ("compiler /bin/false compiles nothing (exit code 1); reinstall", "set CXX to another."),
        ),
        ("/bin/true", ("the C++ compiler /bin/true compiles nothing (exit code 0)",)),
        (f"c++ -include {__file__}", ("compiles nothing (", "error: ", "reinstall it")),
        (f"{__file__}", ("no C++ compiler", "test_compiler.py; install one")),  # not executable
    ],
)
def test_a_host_that_cannot_compile_is_told_what_it_lacks(monkeypatch, compiler, parts):
    monkeypatch.setenv("CXX", compiler)
    has(compiler_problem(), *parts)


def test_a_host_without_headers_of_python_is_told_so_and_one_that_compiles_has_no_problem(monkeypatch):
    expected = subprocess.run(["c++", "-v"], capture_output=True).returncode == 0
    assert (compiler_problem() is None) == (expected and Path(sysconfig.get_path("include"), "Python.h").exists())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/none")
    has(compiler_problem(), "there is no /none/Python.h; install Python's headers")
