"""How a run on one host ends before its last step: asked to, cut off, or left alone by its launcher."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ranks import free_port
from toy import ds_config, write_inputs

from megamoe.training.sinks import read_log

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
SCRIPT = ROOT / "launch_scripts" / "single_node.sh"
STOPPED, LOST, INTERRUPTED = 75, 76, 130  # as docs/launch.md says


def heed_signals():
    """Tests that run in the background have been told to ignore them."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Launch:
    """A run under DeepSpeed's launcher or our script, its output in a file, and the processes that it consists of."""

    def __init__(self, folder, script=None, **options):
        ds = ds_config(1)
        ds["scheduler"]["params"]["total_num_steps"] = 100_000
        run = {**write_inputs(folder, ds), "run_dir": folder / "run", "ep_size": 2, "log_interval": 5, **options}
        launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
        words = [str(script), "2"] if script else [*launcher, str(ROOT / "megamoe" / "pretrain.py")]
        for name, value in run.items():
            words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
        self.run_dir = folder / "run"
        self.output = folder / "output"
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                words, cwd=folder, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
                preexec_fn=heed_signals,
            )  # fmt: skip

    def await_text(self, text, seconds=120):
        until = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < until, self.said
            assert self.process.poll() is None, self.said
            time.sleep(0.1)

    @property
    def said(self):
        return self.output.read_text()

    @property
    def errors(self):
        return [line for line in self.said.splitlines() if line.startswith("error: ")]

    def end(self):
        """Leave nothing running."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.run_dir) in process.cmdline():
                    process.kill()
        self.process.kill()
        self.process.wait()

    def processes(self):
        """launch.py, and the ranks in order."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        launcher = next(one for one in below if "deepspeed.launcher.launch" in one.cmdline())
        ranks = {word: one for one in below for word in one.cmdline() if word.startswith("--local_rank")}
        return launcher, [ranks[word] for word in sorted(ranks)]


@pytest.fixture
def launch(tmp_path):
    started = []

    def start(until="step=5 ", **options):
        started.append(Launch(tmp_path, **options))
        started[0].await_text(until)
        return started[0]

    yield start
    for one in started:
        one.end()


def assert_none_left(processes, seconds=45):
    assert psutil.wait_procs(processes, timeout=seconds)[1] == []


def last_step(run):
    return read_log(run.run_dir)["train"][-1]["step"]


def assert_saved_at_the_last_step(run):
    assert (run.run_dir / "checkpoints" / "latest").read_text() == f"step_{last_step(run)}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_ends_all_at_a_steps_end_with_a_checkpoint(launch, ending, number):
    run = launch()
    _, ranks = run.processes()
    with ending(f"{number.name} to a rank") as end:
        ranks[1].send_signal(number)
        end.code = run.process.wait(60)
    assert end.code == STOPPED, run.said
    assert f"stopped by a signal after step {last_step(run)}" in run.said
    assert_saved_at_the_last_step(run)
    assert_none_left(ranks)


def test_ctrl_c_saves_and_a_second_one_does_not_wait(launch):
    run = launch()
    launcher, ranks = run.processes()
    launcher.suspend()  # or it would end the ranks by itself
    ranks[0].suspend()  # so the other waits for it, and cannot save
    ranks[1].send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert ranks[1].status() != psutil.STATUS_ZOMBIE
    ranks[1].send_signal(signal.SIGINT)
    until = time.monotonic() + 10
    while ranks[1].status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
        time.sleep(0.1)
    assert ranks[1].status() == psutil.STATUS_ZOMBIE
    launcher.resume()
    ranks[0].resume()
    assert run.process.wait(60) == INTERRUPTED, run.said
    assert_none_left(ranks)


def test_a_killed_rank_is_named_and_the_other_ends(launch, ending):
    run = launch()
    _, ranks = run.processes()
    with ending("SIGKILL to a rank") as end:
        ranks[1].kill()
        end.code = run.process.wait(60)
    assert end.code == 256 - signal.SIGKILL, run.said
    (said,) = run.errors
    assert re.match(
        r"error: rank 1 on \S+ died, last heard of in step \d+, .*; resume from the last checkpoint with --resume\.",
        said,
    )
    assert_none_left(ranks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("send", "whom"), [(os.kill, "deepspeed alone"), (os.killpg, "deepspeed and all below it")])
def test_ending_deepspeed_leaves_no_orphan_and_a_checkpoint(launch, ending, send, whom, number):
    run = launch()
    launcher, ranks = run.processes()
    with ending(f"{number.name} to {whom}, until all have exited") as end:
        send(run.process.pid, number)
        end.code = run.process.wait(60)
        assert_none_left([launcher, *ranks])
    assert_saved_at_the_last_step(run)


def test_launch_py_being_ended_alone_lets_the_ranks_save(launch, ending):
    run = launch()
    launcher, ranks = run.processes()
    with ending("SIGTERM to launch.py") as end:
        launcher.terminate()  # it ends the ranks one after another; the first one's signal is enough for all
        end.code = run.process.wait(60)
    assert_none_left(ranks)
    assert_saved_at_the_last_step(run)


def test_a_killed_launcher_leaves_no_orphan_and_a_checkpoint(launch, ending):
    run = launch()
    launcher, ranks = run.processes()
    with ending("SIGKILL to launch.py, until all have exited") as end:
        launcher.kill()
        end.code = run.process.wait(10)
        assert_none_left(ranks)
    assert end.code == 0  # DeepSpeed's own answer, whatever became of the ranks
    assert_saved_at_the_last_step(run)


def test_a_run_saves_and_exits_before_its_time_limit(launch):
    run = launch(until="steps 0 to", time_limit="0:00:20")
    assert run.process.wait(100) == STOPPED, run.said
    assert f"stopped ahead of the time limit after step {last_step(run)}" in run.said
    assert_saved_at_the_last_step(run)


def test_stalled_ranks_end_and_print_where_each_of_them_is(launch):
    run = launch(collective_timeout=5)
    _launcher, ranks = run.processes()
    time.sleep(2.5)  # until each has posted that it is in a step
    ranks[1].suspend()
    assert_none_left(ranks[:1], 60)
    (said,) = run.errors
    place = r"in step \d+, (forward of layer \d|backward of layer \d|optimizer step|reading data)"
    both, each = rf"ranks 0, 1 on \S+ {place}", rf"rank 0 on \S+ {place}; rank 1 on \S+ {place}"
    assert re.match(rf"error: no rank has made progress for 5 s: ({both}|{each}); resume from", said)
    ranks[1].resume()
    assert run.process.wait(60) == LOST, run.said


# --- the script -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_script_ends_all_with_a_checkpoint_and_says_so_by_its_exit_code(launch, ending, number):
    run = launch(script=SCRIPT)
    launcher, ranks = run.processes()
    with ending(f"{number.name} to single_node.sh") as end:
        run.process.send_signal(number)
        end.code = run.process.wait(60)
    assert end.code == STOPPED, run.said
    assert_none_left([launcher, *ranks])
    assert_saved_at_the_last_step(run)


def test_ctrl_c_at_the_terminal_of_the_script_saves(launch, ending):
    run = launch(script=SCRIPT)
    launcher, ranks = run.processes()
    with ending("Ctrl-C at single_node.sh") as end:
        os.killpg(run.process.pid, signal.SIGINT)
        end.code = run.process.wait(60)
    assert end.code == STOPPED, run.said
    assert_none_left([launcher, *ranks])
    assert_saved_at_the_last_step(run)


def test_a_second_ctrl_c_to_the_script_ends_a_run_that_cannot_save(launch, ending):
    run = launch(script=SCRIPT)
    _, ranks = run.processes()
    ranks[0].suspend()  # so the other waits for it
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(1.5)
    with ending("a second Ctrl-C at single_node.sh, one rank hanging") as end:
        os.killpg(run.process.pid, signal.SIGINT)
        end.code = run.process.wait(60)
    assert end.code not in (0, STOPPED), run.said
    ranks[0].resume()
    assert_none_left(ranks)


def test_deepspeed_killed_below_the_script_leaves_no_orphan_and_a_checkpoint(launch, ending):
    run = launch(script=SCRIPT)
    launcher, ranks = run.processes()
    with ending("SIGKILL to deepspeed below single_node.sh, until all have exited") as end:
        launcher.parent().kill()
        end.code = run.process.wait(60)
        assert_none_left([launcher, *ranks])
    assert end.code == 128 + signal.SIGKILL
    assert_saved_at_the_last_step(run)
