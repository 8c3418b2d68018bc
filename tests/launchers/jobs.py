"""A Slurm job of slurm.sbatch: its output, its state, its ranks."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
from cluster import DEADLINE, ROOT, Cluster, wait_for
from runs import inputs, processes_of, ranks_of

from megamoe.monitoring.log_files import read_log


class Job:
    """A job that is submitted from the first host."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        steps: int,
        *options: str,
        tree: Path = ROOT,
        nodes: str = "2",
        tasks: int = 1,
    ) -> None:
        self.host = cluster.hosts["h1"]
        self.run_dir = folder / "runs" / "run"
        folder.mkdir(exist_ok=True)
        self.output = folder / "job.out"
        sent = self.host.run(
            "env", f"MEGAMOE_ROOT={tree}", "sbatch", "--parsable", f"--nodes={nodes}", f"--ntasks-per-node={tasks}",
            f"--output={self.output}", str(tree / "launch_scripts" / "slurm.sbatch"),
            *inputs(folder, steps, *options),
        )  # fmt: skip
        assert sent.returncode == 0, sent.stderr
        self.id = sent.stdout.strip()

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    @property
    def facts(self) -> dict[str, str]:
        shown = self.host.run("scontrol", "show", "job", self.id).stdout
        return dict(word.partition("=")[::2] for word in shown.split())

    def await_text(self, text: str, seconds: float = DEADLINE) -> None:
        def seen() -> bool:
            assert self.facts["JobState"] not in ("FAILED", "NODE_FAIL", "BOOT_FAIL"), self.said
            return text in self.said

        wait_for(seen, lambda: f"{text!r} does not come:\n{self.said}", seconds)

    def await_state(self, state: str, seconds: float = DEADLINE) -> None:
        wait_for(lambda: self.facts["JobState"] == state, lambda: f"the job is not {state}:\n{self.said}", seconds)

    def await_resumes(self, count: int, seconds: float = DEADLINE) -> None:
        """Wait until the run has resumed from a checkpoint for the `count`th time."""
        resumed = re.compile(r"steps [1-9]\d* to")
        wait_for(lambda: len(resumed.findall(self.said)) >= count, lambda: self.said, seconds)

    def await_new_checkpoint(self) -> None:
        latest = self.run_dir / "checkpoints" / "latest"
        before = latest.read_text() if latest.exists() else ""
        wait_for(lambda: latest.exists() and latest.read_text() != before, lambda: self.said)

    def ranks(self) -> list[psutil.Process]:
        return ranks_of(self.run_dir)

    def losses(self) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in read_log(self.run_dir)["train"]}

    def cancel(self) -> None:
        """Cancel the job and wait until its processes have exited."""
        self.host.run("scancel", self.id)
        wait_for(lambda: processes_of(self.run_dir) == [], "processes of the job are left")
        wait_for(lambda: self.facts["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), "the job does not end")
