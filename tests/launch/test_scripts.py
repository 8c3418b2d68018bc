"""The launch scripts without Python: what they refuse by themselves, and how they forward signals."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from ranks import DEADLINE

SCRIPTS = Path(__file__).parent.parent.parent / "launch_scripts"

TORCHRUN = "multi_node_torchrun.sh"
PDSH = (str(SCRIPTS / "multi_node_pdsh.sh"), "hostfile")
JOINED = "echo h1:29400 10.0.0.1 true"  # preflight.py endpoint
# torchrun's agent, whose command line the script looks for, starts ranks.
AGENT = """#!/usr/bin/env bash
exec -a "/home/a user/python --rdzv-endpoint=h1:29400" bash "$0.ranks"
"""
ALONE = {"HOSTS": "1", "RANKS": "2", "ENDPOINT": "h1:29400"}
RANKS = """
rank() {
  trap 'echo 75 > "$MEGAMOE_EXIT_NOTE"; exit 75' USR1
  echo ready
  while :; do sleep 0.02; done
}
rank & rank &
wait -n
"""
REFUSED = [  # variables, the script and its words, and what it says
    ("multi_node_pdsh.sh --steps 5", "the hostfile is '--steps'; start"),
    ("MAX_RESTARTS=x multi_node_pdsh.sh f", "MAX_RESTARTS is 'x'; give a whole number."),
    (f"HOSTS=2 {TORCHRUN}", "HOSTS is '2', RANKS '', ENDPOINT ''; set all three:"),
    (f"HOSTS=2 RANKS=8 ENDPOINT=h1:29400 MAX_RESTARTS=-1 {TORCHRUN}", "MAX_RESTARTS is '-1'; give a whole number."),
    (f"MEGAMOE_ROOT={SCRIPTS.parent} bash slurm.sbatch", "this is not a Slurm job with "),
    ("SLURM_JOB_ID=5 MEGAMOE_ROOT=/none bash slurm.sbatch", "this is not a Slurm job with "),
]


@pytest.mark.parametrize(("line", "error"), REFUSED)
def test_a_script_refuses_what_is_missing_with_exit_code_2_before_any_python(line, error, programs):
    programs(python="echo python was started")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    clean["PATH"] += f":{SCRIPTS}"
    done = subprocess.run(["env", *line.split()], env=clean, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {error}")
    assert done.stdout == ""


def test_a_hostfile_is_refused_in_a_folder_with_a_space(tmp_path):
    scripts = shutil.copytree(SCRIPTS, tmp_path / "a checkout" / "launch_scripts")
    done = subprocess.run(["bash", scripts / "multi_node_pdsh.sh", "hostfile"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: DeepSpeed's launcher for several hosts takes no path with a space; rename ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_each_signal_to_a_script_asks_the_ranks_to_stop_and_gives_their_exit_code(programs, number):
    programs(torchrun=AGENT, python=JOINED, pgrep="exit 127", **{"torchrun.ranks": RANKS})  # slim containers lack pgrep
    environment = {**os.environ, **ALONE}
    with subprocess.Popen(
        [SCRIPTS / TORCHRUN], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as script:
        assert [script.stdout.readline(), script.stdout.readline()] == ["ready\n", "ready\n"]
        script.send_signal(number)
        assert script.wait(DEADLINE) == 75


LAUNCHER = """
source {scripts}/common.sh
MEGAMOE_EXIT_NOTE={folder}/note
rank="trap 'exit 75' USR1; echo \\$\\$ > {folder}/rank; echo ready; while :; do sleep 0.02; done"
run_launcher "a launcher" h1 bash -c "$rank"
"""


def test_a_signal_is_handed_to_the_ranks_of_another_host_and_does_not_interrupt_the_launcher(tmp_path, programs):
    programs(ssh=f"kill -USR1 $(cat {tmp_path}/rank)")  # the host that it would reach
    words = ["bash", "-c", LAUNCHER.format(scripts=SCRIPTS, folder=tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as script:
        assert script.stdout.readline() == "ready\n"
        script.send_signal(signal.SIGTERM)
        assert script.wait(DEADLINE) == 75


def run_script(folder, *words, **variables):
    """Run a script whose programs are replaced; returns its exit code, the starts of ranks, and what it says."""
    environment = {**os.environ, **variables}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    starts = folder / "starts"
    return done.returncode, len(starts.read_text().splitlines()) if starts.exists() else 0, done.stderr


def ranks_that_leave(folder, code, note):
    write = f'echo {note} > "$MEGAMOE_EXIT_NOTE"' if note else ""
    return f"echo start >> {folder}/starts\n{write}\nexit {code}"


def checked(folder):
    """What preflight.py hostfile HOSTFILE --usable FILE does."""
    return f'echo h1 slots=2 > "$5"\necho h1 127.0.0.1 1234 {folder}/runs/mine'


# The launcher's code, that in the ranks' note, the script's, and whether that is restarted.
CODES = [
    (0, "0", 0, False),
    (0, "", 1, True),  # DeepSpeed's launch.py was killed
    (0, "75", 1, True),  # the same, and the ranks have saved and left before the script has looked
    (1, "", 1, True),
    (1, "1", 1, True),
    (1, "2", 2, False),  # torchrun's own 1 for a rank's 2
    (1, "76", 76, True),
    (1, "0", 1, True),
    (2, "2", 2, False),
    (75, "75", 75, False),
    (76, "76", 76, True),
    (137, "", 137, True),
    (247, "76", 247, True),
]


@pytest.mark.parametrize(("launcher", "note", "code", "restarted"), CODES)
def test_the_scripts_restart_what_a_restart_can_cure_and_give_the_ranks_code(
    launcher, note, code, restarted, tmp_path, programs
):
    ranks = ranks_that_leave(tmp_path, launcher, note)
    programs(deepspeed=ranks, torchrun=ranks, python=checked(tmp_path), ssh="exit 1")  # no ranks are left there
    assert run_script(tmp_path, *PDSH, MAX_RESTARTS="1")[:2] == (code, 1 + restarted)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".exit")] == []
    programs(python=JOINED)
    if (launcher, note) == (0, "75"):
        code = 75  # its ranks leave with 0 when they were asked to stop
    assert run_script(tmp_path, str(SCRIPTS / TORCHRUN), **ALONE)[0] == code


def test_what_libraries_read_from_the_environment_is_forwarded_to_the_other_hosts(tmp_path, programs):
    read = {
        "CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "DS_ACCELERATOR": "cuda",
        "FI_PROVIDER": "efa", "LD_PRELOAD": "", "NCCL_DEBUG": "WARN", "PYTORCH_CUDA_ALLOC_CONF": "a:True,b:2",
        "TORCH_CUDA_ARCH_LIST": "8.0 9.0", "TORCHINDUCTOR_CACHE_DIR": "/a", "TRITON_CACHE_DIR": "/b",
    }  # fmt: skip
    read["PATH"] = f"{tmp_path}:/usr/bin:/bin"
    of_this_host = {"CUDA_VISIBLE_DEVICES": "1", "HOSTNAME": "h0", "SECRET": "x"}
    keep = f'cp "$DS_ENV_FILE" {tmp_path}/forwarded\necho 0 > "$MEGAMOE_EXIT_NOTE"'
    programs(deepspeed=keep, python=checked(tmp_path))
    given = {**read, **of_this_host, "PATH": f"/none:{read['PATH']}"}  # DeepSpeed ends at a folder that it cannot enter
    assert run_script(tmp_path, *PDSH, **given)[0] == 0
    lines = (tmp_path / "forwarded").read_text().splitlines()
    forwarded = dict(line.split("=", 1) for line in lines)
    assert read.items() <= forwarded.items()
    assert not forwarded.keys() & {*of_this_host, "DS_ENV_FILE"}


@pytest.mark.parametrize(
    ("code", "saves", "requeued"),
    [
        *[(code, saves, False) for code in (0, 2, 130) for saves in (False, True)],
        *[(75, False, True), (75, True, True)],
        *[(code, saves, saves) for code in (1, 76, 137) for saves in (False, True)],
    ],
)
def test_a_slurm_job_is_requeued_for_what_a_restart_can_cure(code, saves, requeued, tmp_path, programs):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_5"
    checkpoint.mkdir(parents=True)
    programs(
        python=f"echo h1 127.0.0.1 1234 {tmp_path}/run",
        srun=f"{f'touch {checkpoint}/index.json' if saves else ':'}\nexit {code}",
        squeue="echo RUNNING",
        scontrol=f"echo $* >> {tmp_path}/starts",
    )
    script = ["bash", str(SCRIPTS / "slurm.sbatch")]
    end, requeues, said = run_script(tmp_path, *script, SLURM_JOB_ID="5", MEGAMOE_ROOT=str(SCRIPTS.parent))
    assert (end, requeues) == ((0, 1) if requeued else (code, 0)), said
    assert ("if no line above says why, they were killed" in said) == (code not in (0, 2, 75, 130) and not saves)
