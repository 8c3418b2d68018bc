"""Which processes a rank is held by: it saves and leaves when one of them has died."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from megamoe.launch.holders import Holders, pid_space

# A tree of processes: each starts the next, and the last one prints what launchers() returns for it.
LAST = """
import json, psutil
from megamoe.launch.holders import launchers
print(json.dumps([[child.pid, parent] for child, parent in launchers(psutil.Process())]))
"""


def chain(tmp_path, *names):
    """Pairs that a process sees which is started through scripts of these names, outermost first, and their pids."""
    script = tmp_path / "last.py"
    script.write_text(LAST)
    command = [sys.executable, str(script)]
    for name in reversed(names):
        if name == "sh":
            command = ["bash", "-c", f"echo $$; {shlex.join(command)}; true"]
            continue
        start = f"import os, subprocess; print(os.getpid(), flush=True); subprocess.run({command!r})"
        command = [sys.executable, "-c", start, name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *map(str, sys.path)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    *pids, pairs = done.stdout.split("\n", len(names))
    return [int(pid) for pid in pids], json.loads(pairs)


@pytest.mark.parametrize(
    ("above", "watched"),
    [
        (["other"], []),
        (["sh", "torchrun"], [1]),
        (["other", "deepspeed.launcher.launch"], [1, 0]),
        (["other", "sh", "deepspeed.launcher.launch"], [2, 1, 0]),  # sshd and its shell
    ],
)
def test_a_rank_watches_its_launcher_and_what_holds_that(tmp_path, above, watched):
    pids, pairs = chain(tmp_path, *above)
    assert [parent for _, parent in pairs] == [pids[place] for place in watched]


@pytest.fixture
def script():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_a_rank_is_held_by_the_launch_script_on_its_host_until_that_dies(script):
    holders = Holders(False, {"MEGAMOE_SCRIPT": f"{script.pid},{pid_space()}"})
    assert holders.are_alive()
    script.kill()
    os.waitid(os.P_PID, script.pid, os.WEXITED | os.WNOWAIT)  # dead, though its parent has not asked for its code
    assert not holders.are_alive()
    script.wait()
    assert not Holders(False, {"MEGAMOE_SCRIPT": f"{script.pid},{pid_space()}"}).are_alive()  # while the rank loaded


def test_a_script_on_another_host_or_none_holds_no_rank(script):
    others = [Holders(False, {"MEGAMOE_SCRIPT": f"{script.pid},another-boot,pid:[1]"}), Holders(False, {})]
    script.kill()
    script.wait()
    assert all(one.are_alive() for one in others)
