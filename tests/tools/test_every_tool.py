"""Every program in tools/ and tools/dev/ starts."""

import runpy
import sys
from pathlib import Path

import pytest
from refusals import has

PARTS = {"benchmark_models", "step_profile", "ablation_results"}  # of benchmark_contender and ablate
TOOLS = sorted(path for path in (Path(__file__).parents[2] / "tools").rglob("*.py") if path.stem not in PARTS)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_every_tool_explains_itself(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(tool), "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(tool), run_name="__main__")
    assert caught.value.code == 0
    has(capsys.readouterr().out.lower(), "usage: ")
