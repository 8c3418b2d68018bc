"""Over real ranks: which checkpoint is restored, where some are damaged or are not what their name says."""

import contextlib
import io
import json
import os
import shutil

import pytest
import torch.distributed as dist
from engines import make, train, writer_for
from indexed import flip_bit
from ranks import run_ranks
from refusals import only, sentences

from megamoe.checkpoint import folders
from megamoe.checkpoint.index import read_index
from megamoe.checkpoint.opening import find_checkpoint
from megamoe.checkpoint.restore import first_verified, restore_first_verified
from megamoe.utils.errors import UserError


def find_each(paths, weights_only):
    """For each folder: what is restored, or the problems, and the lines that are printed; the same without an
    engine."""
    engine = make(1, stage=1)
    found = []
    for path in paths:
        attempts = [lambda steps: restore_first_verified(engine, steps, weights_only), first_verified]
        one, other = (find(attempt, folders.step_folders(path)) for attempt in attempts)
        assert one == other
        found.append(one)
    return found


def find(attempt, steps):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            answer = attempt(steps)
            answer = answer and answer.name
        except UserError as error:
            answer = error.problems
    return answer, said.getvalue().splitlines()


def save_steps(run, other):
    """Save the steps 3 and 6 into the folder of a run, and step 9 of another."""
    engine = make(2)
    writers = [writer_for(engine, folder) for folder in (run, other)]
    for writer, run_id in zip(writers, ("mine", "another"), strict=True):
        writer.record["run_id"] = run_id
    for step, writer in ((3, writers[0]), (6, writers[0]), (9, writers[1])):
        train(engine, 3, step - 3)
        writer.save(step, hold=True)
        assert writer.complete()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The folder of a run of 2 ranks with checkpoints at steps 3 and 6; next to it, step 9 of another run."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(2, save_steps, folder / "run" / "checkpoints", folder / "other")
    (folder / "run" / "run.json").write_text(json.dumps({"run_id": "mine"}))
    return folder / "run"


FILE = "rank_00001.safetensors"


def flip_in(kind):
    """Flip a bit in a tensor of that kind in the file of rank 1."""

    def change(folder):
        index = read_index(folder / "step_6")
        piece = next(one for one in index.files[FILE].slices if kind in one.tensors)
        flip_bit(folder / "step_6" / FILE, piece.tensors[kind].offset + 1, 4)

    return change


def exchange(folder):
    (folder / "step_3").rename(folder / "away")
    (folder / "step_6").rename(folder / "step_3")
    (folder / "away").rename(folder / "step_6")


def damage_both(folder):
    flip_in("exp_avg")(folder)
    (folder / "step_3" / "rank_00000.safetensors").unlink()


def append_to_script(folder):
    with open(folder / "step_6" / "zero_to_fp32.py", "a") as file:
        file.write("import os\n")


def copy_of_another_run(folder):
    shutil.copytree(folder.parents[1] / "other" / "step_9", folder / "step_9")


# What happens to the checkpoints; what the first line or problem says of it; what is found, None if nothing.
TROUBLE = {
    "nothing": (lambda folder: (folder / "latest").write_text("step_3"), "", "step_6"),  # which no reader goes by
    "exp_avg_sq": (flip_in("exp_avg_sq"), f"step_6/{FILE} has not the SHA-256", "step_3"),
    "fp32": (flip_in("fp32"), f"step_6/{FILE} has not the SHA-256", "step_3"),
    "script": (append_to_script, "step_6/zero_to_fp32.py", "step_3"),
    "index": (lambda folder: flip_bit(folder / "step_6" / "index.json", 200), "step_6/index.json", "step_3"),
    "both": (damage_both, f"step_6/{FILE} has not the SHA-256", None),
    "exchanged": (exchange, "of step 3, but its folder is called", None),
    "linked": (lambda folder: (folder / "step_9").symlink_to("step_6"), "is called step_9", "step_6"),
    "moved": (lambda folder: (folder / "step_6").rename(folder / "step_7.1"), "is called step_7.1", "step_3"),
    "empty": (lambda folder: (folder / "step_8").mkdir(), "was not saved completely, for it has no index", "step_6"),
    "no index": (lambda folder: (folder / "step_6" / "index.json").unlink(), "was not saved completely", "step_3"),
    "other run": (copy_of_another_run, "it is of the run another, but lies in the folder of the run mine", "step_6"),
}  # fmt: skip
LAST = {  # what is said of step_3 where nothing is found
    "both": "step_3/rank_00000.safetensors is missing",
    "exchanged": "of step 6, but its folder is called step_3",
}


def test_all_ranks_pass_over_what_is_damaged_or_not_of_its_name_together_and_one_says_so(run_dir, tmp_path, capsys):
    shutil.copytree(run_dir.parent / "other", tmp_path / "other")
    paths = {name: shutil.copytree(run_dir, tmp_path / name) / "checkpoints" for name in TROUBLE}
    for name, path in paths.items():
        TROUBLE[name][0](path)
    places = [*paths.values(), tmp_path / "none"]
    for weights_only in (True, False):  # weights alone are verified with the state of the optimizer
        answers, others = run_ranks(2, find_each, places, weights_only)
        assert [found for found, _ in others] == [found for found, _ in answers]
        assert all(lines == [] for _, lines in others)
        assert answers.pop() == (None, [])
    capsys.readouterr()
    for (name, path), (answer, lines) in zip(paths.items(), answers, strict=True):
        _, says, found = TROUBLE[name]
        assert sentences(lines) or name == "nothing"
        assert all(line.startswith(f"passed over {path}") for line in lines), name
        assert says in "".join(lines[:1]), name
        if found:
            assert (name, answer) == (name, found)
            assert len(lines) == (name != "nothing")
            assert find_checkpoint(path.parent).name == found
        else:
            assert LAST[name] in only(sentences(answer))
            assert len(lines) == 2
            with pytest.raises(UserError, match="every checkpoint"):
                find_checkpoint(path.parent)
        assert capsys.readouterr().out.splitlines() == lines


def restore_from_a_disk_in_trouble(newest_first):
    """What becomes of a resume for which rank 1's disk gives nothing at the moment."""
    engine = make(2, seed=99)

    def fail(*args):
        raise OSError(5, "Input/output error")

    with pytest.MonkeyPatch.context() as patching:
        if dist.get_rank() == 1:
            patching.setattr(os, "preadv", fail)
        try:
            restore_first_verified(engine, newest_first)
        except OSError as error:
            return str(error)
    return None


def test_a_disk_in_trouble_ends_a_resume_on_all_ranks_and_does_not_send_it_to_an_older_checkpoint(run_dir):
    paths = [run_dir / "checkpoints" / f"step_{step}" for step in (6, 3)]
    said = run_ranks(2, restore_from_a_disk_in_trouble, paths)
    assert said == [f"{paths[0]} cannot be read now (Input/output error)"] * 2
