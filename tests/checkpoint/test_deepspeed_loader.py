"""Checkpoints and DeepSpeed's own loaders: its files are read here, and it reads ours."""

import pytest
import torch
from engines import load_and_train, make, same_state, save_by_deepspeed, train, train_and_save
from ranks import run_ranks

from megamoe.checkpoint import manifest
from megamoe.checkpoint.export import write_universal
from megamoe.checkpoint.reader import load_buffers, open_source


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Saved at step 3 by 4 ranks x ep_size 2, with the losses of the 5 steps that follow."""
    folder = tmp_path_factory.mktemp("trained")
    (_, losses), *_ = run_ranks(4, train_and_save, folder, 2, 2, 3, 5)
    return folder / "step_3", losses


def load_by_deepspeed(folder, tag, ep_size, steps, universal=False):
    engine = make(ep_size, seed=99, **({"checkpoint": {"load_universal": True}} if universal else {}))
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    assert path
    if universal:  # DeepSpeed restores no buffers from it
        load_buffers(engine.module, open_source(folder / tag))
    return train(engine, steps, engine.global_steps)


def test_deepspeeds_own_loader_reads_a_checkpoint_at_the_same_topology(trained):
    checkpoint, losses = trained
    resumed = run_ranks(4, load_by_deepspeed, checkpoint.parent, checkpoint.name, 2, 5)[0]
    assert resumed == losses


def test_a_checkpoint_that_deepspeed_has_written_is_resharded_too(tmp_path):
    losses = run_ranks(4, save_by_deepspeed, tmp_path, 2)[0]
    _, resumed = run_ranks(2, load_and_train, tmp_path / "step_3", 1, 2, 5)[0]
    torch.testing.assert_close(resumed, losses, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def universal(trained):
    checkpoint, _ = trained
    out = checkpoint.parent / "universal" / "step_3"
    write_universal(open_source(checkpoint, open_files=1), checkpoint, out)
    (out.parent / "latest_universal").write_text("step_3")
    return out


def test_the_universal_layout_holds_the_same_state_and_a_manifest_that_verifies(trained, universal):
    same_state(trained[0], universal)
    assert manifest.problems(universal) == []
    assert len(manifest.read_manifest(universal)["files"]) == len(open_source(universal).shapes) * 4 + 3


@pytest.mark.parametrize(("ranks", "ep_size"), [(1, 1), (2, 2)])
def test_the_universal_layout_goes_on_at_any_ep_size(trained, universal, ranks, ep_size):
    _, resumed = run_ranks(ranks, load_and_train, universal, ep_size, 2, 5)[0]
    torch.testing.assert_close(resumed, trained[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_deepspeeds_own_universal_loader_reads_it_at_an_ep_size_of_1(trained, universal, ranks):
    resumed = run_ranks(ranks, load_by_deepspeed, universal.parent, "step_3", 1, 5, True)[0]
    torch.testing.assert_close(resumed, trained[1], atol=1e-5, rtol=0)
