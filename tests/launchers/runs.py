"""A run that a script has started on a host: its output, its processes, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import psutil
from cluster import ROOT, Host, wait_for
from toy import write_inputs

from megamoe.config import read_json
from megamoe.training.sinks import read_log

STOPPED, LOST, INTERRUPTED = 75, 76, 130  # as docs/launch.md says


def inputs(folder: Path, steps: int, *more: str, samples: int = 4) -> list[str]:
    """The options of a run of the preset `tiny` below `folder`, of whose 100,000 steps it does so many, and `more`."""
    ds = read_json(ROOT / "ds_configs" / "tiny.json")
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        ds.pop(key, None)
    ds |= {"train_batch_size": samples}
    ds["scheduler"]["params"]["total_num_steps"] = 100_000
    run = write_inputs(folder, ds)
    return ["--ds_config", run["ds_config"], "--preset", "tiny", "--data", *run["data"], "--seq_len", "16",
            "--run_dir", str(folder / "runs" / "run"), "--log_interval", "1", "--eval_interval", "0",
            "--steps", str(steps), *more]  # fmt: skip


class Run:
    def __init__(self, host: Host, folder: Path, words: list[str], variables: dict[str, str] | None = None):
        self.run_dir = folder / "runs" / "run"
        self.output = folder / f"output-{host.name}"
        self.process = host.spawn(self.output, *words, **(variables or {}))

    @property
    def script(self) -> psutil.Process:
        """The script itself: what was started is the one that waits for it in this namespace."""
        return psutil.Process(self.process.pid).children()[0]

    @property
    def said(self) -> str:
        return self.output.read_text()

    @property
    def errors(self) -> list[str]:
        """Lines of errors; pdsh puts the host before each."""
        return [line[line.index("error: "):] for line in self.said.splitlines() if "error: " in line]  # fmt: skip

    def await_text(self, text: str, seconds: float = 120) -> None:
        self.await_any(text, self, seconds)

    def await_any(self, text: str, other: Run, seconds: float = 120) -> None:
        """Wait until this run or the other says `text`."""

        def seen() -> bool:
            said = self.said + other.said
            assert text in said or self.process.poll() is None, said
            return text in said

        wait_for(seen, f"{text!r} does not come", seconds)

    def wait(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run does not end:\n{self.said}") from None

    def processes(self, *parts: str) -> list[psutil.Process]:
        """Processes of all hosts whose command line has all the parts and this run's folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if str(self.run_dir) in line and all(part in line for part in parts):
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        return [
            process
            for process in self.processes("megamoe/pretrain.py")
            if Path(process.cmdline()[0]).name.startswith("python") and process.cmdline()[2].endswith("pretrain.py")
        ]

    @property
    def latest(self) -> str:
        return (self.run_dir / "checkpoints" / "latest").read_text()

    @property
    def last_step(self) -> int:
        return read_log(self.run_dir)["train"][-1]["step"]

    def end(self) -> None:
        """Leave nothing running."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
