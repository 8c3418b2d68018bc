"""The launch scripts without Python: what they refuse by themselves, and how they forward signals."""

import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from megamoe.launch.network import free_port

SCRIPTS = Path(__file__).parent.parent.parent / "launch_scripts"

# deepspeed starts launch.py, whose command line the scripts look for, and that starts ranks.
DEEPSPEED = """#!/usr/bin/env bash
exec -a "python -u -m deepspeed.launcher.launch --master_port=$4" bash "$0.ranks" &
wait $!
"""
RANKS = """
rank() {
  trap 'exit 75' USR1
  echo ready
  while :; do sleep 0.02; done
}
rank & rank &
wait -n
"""


@pytest.mark.parametrize(
    ("script", "words", "environment", "error"),
    [
        ("single_node.sh", [], {}, "error: the number of ranks is ''; start launch_scripts/single_node.sh RANKS"),
        ("single_node.sh", ["--ds_config"], {}, "error: the number of ranks is '--ds_config'; start"),
        ("multi_node_pdsh.sh", [], {}, "error: the hostfile is ''; start launch_scripts/multi_node_pdsh.sh HOSTFILE"),
        ("multi_node_pdsh.sh", ["--steps", "5"], {}, "error: the hostfile is '--steps'; start"),
        ("multi_node_pdsh.sh", ["f"], {"MAX_RESTARTS": "x"}, "error: MAX_RESTARTS is 'x'; give a whole number."),
        ("multi_node_torchrun.sh", [], {"HOSTS": "2"}, "error: HOSTS is '2', RANKS '', ENDPOINT ''; set all three:"),
        (
            "multi_node_torchrun.sh",
            [],
            {"HOSTS": "2", "RANKS": "8", "ENDPOINT": "h1:29400", "MAX_RESTARTS": "-1"},
            "error: MAX_RESTARTS is '-1'; give a whole number.",
        ),
        ("slurm.sbatch", [], {"MEGAMOE_ROOT": str(SCRIPTS.parent)}, "error: this is not a Slurm job with "),
        ("slurm.sbatch", [], {"SLURM_JOB_ID": "5", "MEGAMOE_ROOT": "/none"}, "error: this is not a Slurm job with "),
    ],
)
def test_a_script_refuses_what_is_missing_with_exit_code_2_before_any_python(
    script, words, environment, error, tmp_path
):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    (tmp_path / "python").write_text("#!/bin/sh\necho python was started\n")
    (tmp_path / "python").chmod(0o755)
    clean["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", SCRIPTS / script, *words], env={**clean, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(error)
    assert done.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_each_signal_to_a_script_asks_the_ranks_to_stop_and_gives_their_exit_code(tmp_path, number):
    (tmp_path / "deepspeed").write_text(DEEPSPEED)
    (tmp_path / "deepspeed").chmod(stat.S_IRWXU)
    (tmp_path / "deepspeed.ranks").write_text(RANKS)

    def heed_signals():
        for one in (signal.SIGINT, signal.SIGHUP):
            signal.signal(one, signal.SIG_DFL)

    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_PORT": str(free_port())}
    with subprocess.Popen(
        [SCRIPTS / "single_node.sh", "2"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    ) as script:
        assert [script.stdout.readline(), script.stdout.readline()] == ["ready\n", "ready\n"]
        script.send_signal(number)
        assert script.wait(20) == 75
