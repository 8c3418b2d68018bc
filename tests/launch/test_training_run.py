"""single_node.sh with all that it starts: `megamoe train`, and ranks that train. Other ends are in test_local.py and
test_exits.py and, under every launcher, in tests/launchers."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from ranks import DEADLINE, run_ranks
from toy import ds_config, train_here, write_inputs

SCRIPT = Path(__file__).parent.parent.parent / "launch_scripts" / "single_node.sh"


def test_a_run_that_is_asked_to_stop_saves_and_resumes(tmp_path):
    ds = ds_config(2)
    ds["scheduler"]["params"]["total_num_steps"] = 100_000
    run = {**write_inputs(tmp_path, ds), "run_dir": str(tmp_path / "run"), "ep_size": 2, "eval_interval": 0}
    words = [f"--{key}={value[0] if isinstance(value, list) else value}" for key, value in run.items()]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = subprocess.Popen(
        [SCRIPT, "2", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    end = threading.Timer(DEADLINE, os.killpg, (script.pid, signal.SIGKILL))
    end.start()
    said = []
    try:
        for line in script.stdout:  # until the last of its processes has closed it
            said.append(line)
            if "step=2 avg_loss" in line:
                script.send_signal(signal.SIGTERM)
        assert script.wait(DEADLINE) == 75, "".join(said)
    finally:
        end.cancel()
    logged = [line for line in said if re.search(r"step=\d+ avg_loss=\d\.\d{4} lr=\S+ tok/s=\d+ mfu=\d+\.\d% ", line)]
    last = len(logged)  # only one rank prints
    assert any(f"stopped by a signal after step {last};" in line for line in said), "".join(said)
    assert {line for line in said if said.count(line) > 1 or "WARNING" in line} == set()
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{last}"
    resumed = run_ranks(2, train_here, {**run, "steps": last + 2, "auto_resume": True})[0]
    assert [record["step"] for record in resumed["train"]] == list(range(1, last + 3))
