"""Every program in tools/ and tools/dev/ starts."""

import os
import runpy
import sys
from pathlib import Path

import pytest
from refusals import has

PARTS = {"benchmark_models", "step_profile", "ablation_results"}  # of benchmark_contender and ablate
TOOLS = sorted(path for path in (Path(__file__).parents[2] / "tools").rglob("*.py") if path.stem not in PARTS)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_every_tool_explains_itself(tool, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(tool), "--help"])
    monkeypatch.setattr(os, "_exit", sys.exit)  # with which a rank leaves
    monkeypatch.setenv("MEGAMOE_EXIT_NOTE", str(tmp_path / "note"))
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(tool), run_name="__main__")
    assert caught.value.code == 0
    has(capsys.readouterr().out.lower(), "usage: ")
    if tool.stem == "evaluate":  # which launch_scripts/single_node.sh may start
        assert (tmp_path / "note").read_text() == "0\n"
