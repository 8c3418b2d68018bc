"""A run on a disk that is full, which is a file system in a mount namespace."""

import os
import shutil
import subprocess
import sys

import pytest
from cluster import DEADLINE, ROOT
from ranks import run_ranks
from toy import ds_config, losses, train_here, write_inputs


def run_on_a_small_disk(run, folder, kilobytes):
    """Train into a file system of that size, in a mount namespace of its own; its run folder is copied out."""
    words = [sys.executable, str(ROOT / "megamoe" / "pretrain.py")]
    for name, value in {**run, "run_dir": str(folder / "small" / "run")}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    script = f"""
        mount -t tmpfs -o size={kilobytes}k none {folder}/small && "$@"
        code=$?
        cp -r {folder}/small/run {folder}/copy
        exit $code"""
    (folder / "small").mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode and "CI" not in os.environ:
        pytest.skip("this machine does not let its users make a mount namespace, so there is no small disk to fill")
    return subprocess.run(
        [*unshare, "sh", "-c", script, "sh", *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as the ranks of the tests, or sums round otherwise
    )


@pytest.mark.parametrize("foreground", [False, True])
def test_on_a_full_disk_training_goes_on_from_the_old_checkpoint_with_a_loud_line(tmp_path, foreground):
    run = write_inputs(tmp_path, ds_config(4))
    whole = run_ranks(1, train_here, {**run, "run_dir": str(tmp_path / "whole"), "steps": 12})[0]
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoints" / "step_12").iterdir())
    options = {**run, "save_interval": 3, "steps": 9}
    if foreground:
        options["foreground_save"] = []
    # Enough for one checkpoint and a half, and for the log.
    done = run_on_a_small_disk(options, tmp_path, 150 + size * 3 // 2 // 1024)
    loud = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1, done.stderr  # a restart can cure it
    assert len(loud) == 2, done.stderr  # steps 6 and 9
    for step, line in zip((6, 9), loud, strict=True):
        assert f"step_{step} was NOT saved" in line
        assert "No space left on device" in line
        assert "step_3 is still the newest checkpoint" in line
    assert "Traceback" not in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("step=9 avg")]
    left = sorted(path.name for path in (tmp_path / "copy" / "checkpoints").iterdir())
    assert left == ["latest", "step_3"]
    # On a disk that is not full, the run goes on from there with the losses of one that met no full disk.
    shutil.move(tmp_path / "copy", tmp_path / "run")
    log = run_ranks(1, train_here, {**run, "run_dir": str(tmp_path / "run"), "steps": 12, "resume": True})[0]
    assert losses(log) == losses(whole)
