"""Run folders that versions before this one have written still resume, convert and are verified."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from toy import train_here, write_inputs

from megamoe.checkpoint import folders, verify
from megamoe.checkpoint.index import read_index
from megamoe.checkpoint.opening import find_checkpoint, open_source
from megamoe.config.model import load_preset
from megamoe.formats.export import write_state_dict
from megamoe.formats.source_checks import model_problems

VERSIONS = ["packages", "stacking"]  # what each came before


@pytest.fixture(params=VERSIONS, ids=[f"before {name}" for name in VERSIONS])
def before(request):
    return Path(__file__).parent / f"run_before_{request.param}"


def resumed(before, folder, ranks, ep_size):
    """Losses of the five steps after the checkpoint."""
    shutil.copytree(before, folder / "run")
    inputs = write_inputs(folder, {})  # for the corpus
    run = {
        **inputs, "ds_config": str(before / "ds.json"), "preset": str(before / "preset.json"), "ep_size": ep_size,
        "run_dir": str(folder / "run"), "steps": 8, "resume": True,
    }  # fmt: skip
    log = run_ranks(ranks, train_here, run)[0]["train"]
    assert [record["step"] for record in log] == [4, 5, 6, 7, 8]
    found = folders.checkpoints(folder / "run" / "checkpoints")
    assert [path.name for path in found] == ["step_8", "step_3"]
    assert read_index(found[0]).parent == "step_3"  # the new form, next to the old one
    assert find_checkpoint(folder / "run") == found[0]
    return [record["loss"] for record in log]


@pytest.mark.parametrize(("ranks", "ep_size"), [(2, 2), (1, 1)])
def test_it_resumes_with_the_losses_of_its_own_version_on_the_same_and_on_other_ranks(before, tmp_path, ranks, ep_size):
    expected = json.loads((before / "losses.json").read_text())
    torch.testing.assert_close(resumed(before, tmp_path, ranks, ep_size), expected, atol=1e-5, rtol=0)
    assert expected[0] - expected[-1] > 0.1  # it learns, so the losses can tell


def test_it_is_verified_and_converts(before, tmp_path):
    checkpoint = find_checkpoint(before)
    assert verify.problems(checkpoint) == []
    source = open_source(checkpoint)
    assert model_problems(source, load_preset(str(before / "preset.json")), "it") == []
    write_state_dict(source, tmp_path / "weights.pt", torch.float32)
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert {name: tuple(state[name].shape) for name in source.shapes} == source.shapes
