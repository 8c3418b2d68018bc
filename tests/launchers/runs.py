"""A run that a launcher has started on a host: its output, its processes, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import psutil
from cluster import DEADLINE, ROOT, ThisHost, wait_for
from toy import write_inputs

from megamoe.monitoring.log_files import read_log
from megamoe.utils.json_files import read_json

STOPPED, LOST, INTERRUPTED = 75, 76, 130  # as in docs/reference/exit_codes.md


def inputs(folder: Path, steps: int, *more: str) -> list[str]:
    """The options of a run of a small model below `folder` that does `steps` of its 100,000 steps, and `more`."""
    ds = read_json(ROOT / "ds_configs" / "tiny.json")
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        ds.pop(key, None)
    ds |= {"train_batch_size": 4}
    ds["scheduler"]["params"]["total_num_steps"] = 100_000
    run = write_inputs(folder, ds)
    return ["--ds_config", run["ds_config"], "--preset", run["preset"], "--data", *run["data"],
            "--run_dir", str(folder / "runs" / "run"), "--log_interval", "1", "--eval_interval", "0",
            "--steps", str(steps), *more]  # fmt: skip


def processes_of(run_dir: Path, *parts: str) -> list[psutil.Process]:
    """Processes of all hosts whose command line has the run folder and all the parts."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if str(run_dir) in line and all(part in line for part in parts):
                found.append(process)
    return found


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """The ranks' processes on all hosts, by rank."""
    ranks = {}
    for process in processes_of(run_dir, "megamoe/pretrain.py"):
        with contextlib.suppress(psutil.Error):
            command, environment = process.cmdline(), process.environ()
            if Path(command[0]).name.startswith("python") and command[2].endswith("pretrain.py"):
                ranks[int(environment.get("RANK") or environment["SLURM_PROCID"])] = process
    return [ranks[rank] for rank in sorted(ranks)]


class Run:
    def __init__(self, host: ThisHost, folder: Path, words: list[str], variables: dict[str, str] | None = None) -> None:
        self.run_dir = folder / "runs" / "run"
        self.output = folder / f"output-{host.name}"
        self.process = host.spawn(self.output, *words, **(variables or {}))

    @property
    def script(self) -> psutil.Process:
        """The script on a host of the cluster: the process that was started waits for it in the tests' namespace."""
        return psutil.Process(self.process.pid).children()[0]

    @property
    def said(self) -> str:
        return self.output.read_text()

    @property
    def errors(self) -> list[str]:
        """Lines of errors; pdsh puts the host before each."""
        return [line[line.index("error: "):] for line in self.said.splitlines() if "error: " in line]  # fmt: skip

    def await_text(self, text: str, seconds: float = DEADLINE) -> None:
        self.await_any(text, self, seconds)

    def await_any(self, text: str, other: Run, seconds: float = DEADLINE) -> None:
        """Wait until this run or the other prints `text`."""

        def seen() -> bool:
            said = self.said + other.said
            assert text in said or self.process.poll() is None, said
            return text in said

        wait_for(seen, lambda: f"{text!r} does not come:\n{self.said}{other.said}", seconds)

    def wait(self, seconds: float = DEADLINE) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run does not end:\n{self.said}") from None

    def processes(self, *parts: str) -> list[psutil.Process]:
        return processes_of(self.run_dir, *parts)

    def ranks(self) -> list[psutil.Process]:
        return ranks_of(self.run_dir)

    @property
    def latest(self) -> str:
        return (self.run_dir / "checkpoints" / "latest").read_text()

    @property
    def last_step(self) -> int:
        return read_log(self.run_dir)["train"][-1]["step"]

    def assert_saved_at_the_last_step(self) -> None:
        assert self.latest == f"step_{self.last_step}"

    def assert_none_left(self, seconds: float = DEADLINE) -> None:
        wait_for(lambda: self.processes() == [], "processes are left", seconds)

    def end(self) -> None:
        """Leave nothing running."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
