"""Programs, called in the process of the tests."""

import sys

import pytest

from megamoe.config import cli


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls a program's `main`; returns the lines that it prints."""

    def call(tool, *words):
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, words)])
        tool.main()
        return capsys.readouterr().out.splitlines()

    return call


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a program to its exit; returns its exit code, and what it says as `out` and `err`."""

    def run(tool, *words):
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.run(tool.main)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return caught.value.code, said

    return run
