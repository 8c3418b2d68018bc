"""Programs of a host, replaced."""

import pytest


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Writes scripts of sh, or what their first line names, by the names of the programs that they stand for."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / name).write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)

    return write
