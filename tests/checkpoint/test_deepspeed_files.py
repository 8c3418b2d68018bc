"""What DeepSpeed has saved, alone or as form 1 of megamoe, is read value by value, or refused."""

import math
import os
import shutil

import pytest
import torch
from engines import load_and_train, same_state, save, train
from form_1 import CHECKPOINT, Malicious, make_for_deepspeed, seal
from ranks import run_ranks
from refusals import has, only, refusal, refusals

from megamoe.checkpoint import verify
from megamoe.checkpoint.deepspeed_files import RankFiles
from megamoe.checkpoint.opening import find_checkpoint, open_source

MAIN, RANK_0, RANK_1 = (
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero_pp_rank_1_mp_rank_00_optim_states.pt",
)


@pytest.fixture
def checkpoint(tmp_path):
    """Of form 1, saved by two ranks that share each layer's experts."""
    return shutil.copytree(CHECKPOINT, tmp_path / "step_3")


BF16 = {"bf16": {"enabled": True}}  # in fp32 those of versions before resume: test_version_before.py


def save_twice(folder):
    """Save the same engine by DeepSpeed and by megamoe; returns the losses of the five steps that follow."""
    engine = make_for_deepspeed(2, **BF16)
    train(engine, 3)
    engine.save_checkpoint(str(folder / "deepspeed"), tag="step_3")
    save(engine, folder / "megamoe", 3)
    return train(engine, 5, 3)


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twice")
    return folder, run_ranks(4, save_twice, folder)[0]


# --- the values -----------------------------------------------------------------------------------------------------


def test_of_one_engine_deepspeeds_files_and_ours_hold_the_same_state_to_the_bit(saved_twice):
    folder, _ = saved_twice
    same_state(folder / "deepspeed" / "step_3", folder / "megamoe" / "step_3")
    source = open_source(folder / "deepspeed" / "step_3")
    assert isinstance(source, RankFiles)
    assert (source.world_size, source.ep_size, source.zero_stage) == (4, 2, 2)


def load_with(checkpoint, ep_size, resave):
    return load_and_train(checkpoint, ep_size, steps=5, resave=resave, **BF16)


@pytest.mark.parametrize(("ranks", "ep_size", "sealed"), [(2, 1, False), (4, 2, True)])
def test_what_deepspeed_has_saved_is_restored_and_saved_again_in_form_2(saved_twice, tmp_path, ranks, ep_size, sealed):
    folder, losses = saved_twice
    checkpoint = shutil.copytree(folder / "deepspeed" / "step_3", tmp_path / "one" / "step_3")
    if sealed:  # as form 1
        seal(checkpoint, {})
    assert verify.problems(checkpoint) == []
    (step, _), resumed = run_ranks(ranks, load_with, checkpoint, ep_size, tmp_path / "two")[0]
    assert step == 3
    torch.testing.assert_close(resumed, losses, atol=2e-2, rtol=0)
    assert losses[0] - losses[-1] > 0.1  # it learns, so the losses can tell
    assert (tmp_path / "two" / "step_3" / "index.json").is_file()
    same_state(checkpoint, tmp_path / "two" / "step_3")


def restore_problems(checkpoint):
    return refusals(load_and_train, checkpoint, 1)


def test_what_deepspeed_has_saved_is_refused_under_the_name_of_another_step(checkpoint):
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "run.json").unlink()
    checkpoint = checkpoint.rename(checkpoint.with_name("step_9"))
    (problems,) = run_ranks(1, restore_problems, checkpoint)
    has(only(problems), str(checkpoint), "the state of step 3", "older checkpoint")


def test_a_stretch_that_two_ranks_share_is_joined(checkpoint):
    source = open_source(checkpoint)
    for name, shape in source.shapes.items():
        count = math.prod(shape)
        whole = source.read(name, "exp_avg", 0, count)
        assert whole.numel() == count
        for start in range(0, count, 7):
            assert torch.equal(source.read(name, "exp_avg", start, min(11, count - start)), whole[start : start + 11])


# --- damage ---------------------------------------------------------------------------------------------------------


def change(path, change):
    """Let `change` change what is in a file."""
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("name", [MAIN, RANK_1])
def test_a_planted_pickle_is_refused_by_name_and_does_not_run(checkpoint, tmp_path, name):
    mark = tmp_path / "mark"
    change(checkpoint / name, lambda state: state.update(ds_version=Malicious(mark)))
    has(refusal(open_source, checkpoint), str(checkpoint / name), "system", "do not open it")
    assert not mark.exists()


def test_a_missing_ranks_file_is_named(checkpoint):
    path = checkpoint / RANK_1
    path.unlink()
    has(refusal(open_source, checkpoint), path.name, "the file of rank 1")
    has(refusal(find_checkpoint, checkpoint), str(path), "is missing")


def test_a_truncated_file_is_named(checkpoint):
    path = checkpoint / RANK_1
    os.truncate(path, path.stat().st_size // 2)
    has(refusal(open_source, checkpoint), str(path), "damaged")
    has(refusal(find_checkpoint, checkpoint), str(path), "bytes, not the")


@pytest.mark.parametrize("key", ["round_robin_gradients", "elastic_checkpoint"])
def test_a_layout_that_does_not_say_which_values_are_whose_is_refused(checkpoint, key):
    change(checkpoint / MAIN, lambda state: state["ds_config"]["zero_optimization"].update({key: True}))
    has(refusal(open_source, checkpoint), key, "save it again without")


def test_the_files_of_another_optimizer_of_deepspeed_are_refused(checkpoint):
    change(checkpoint / RANK_0, lambda state: state["optimizer_state_dict"].pop("single_partition_of_fp32_groups"))
    has(refusal(open_source, checkpoint), "another optimizer", "save it again with ZeRO-2")


def test_a_parameter_whose_name_leads_out_of_the_folder_is_refused(checkpoint):
    whole = (checkpoint / RANK_0).read_bytes()
    for name in ("../../escaped", "layers/0", ""):

        def add(state, name=name):
            mapping = state["optimizer_state_dict"]["param_slice_mappings"][0]
            mapping[name] = next(iter(mapping.values()))

        (checkpoint / RANK_0).write_bytes(whole)
        change(checkpoint / RANK_0, add)
        has(refusal(open_source, checkpoint), str(checkpoint / RANK_0), repr(name), "is no name of one")


def save_another(folder):
    engine = make_for_deepspeed(2)
    train(engine, 3)
    engine.save_checkpoint(str(folder), tag="step_3")


def test_files_of_two_checkpoints_do_not_pass_for_one(checkpoint, tmp_path):
    run_ranks(2, save_another, tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "step_3" / RANK_1, checkpoint / RANK_1)
    has(refusal(open_source, checkpoint), "not all of one checkpoint")


def test_files_with_something_else_in_them_are_one_sentence(checkpoint):
    for name, contents in (
        (RANK_0, ({"optimizer_state_dict": {"single_partition_of_fp32_groups": []}}, {"optimizer_state_dict": {}}, 3)),
        (MAIN, ({"module": {}}, [], {"ds_config": 1})),
    ):
        whole = (checkpoint / name).read_bytes()
        for content in contents:
            torch.save(content, checkpoint / name)
            has(refusal(open_source, checkpoint), str(checkpoint))
        (checkpoint / name).write_bytes(whole)
