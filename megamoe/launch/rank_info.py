"""Which rank this process is and where rank 0 is, from what a launcher puts into the environment.

DeepSpeed's launcher and torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; Slurm's srun has names
of its own.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megamoe.launch.network import free_port
from megamoe.utils.errors import UserError

RANK_ON_HOST = "MEGAMOE_LOCAL_RANK"  # stays the rank's, where "LOCAL_RANK" becomes the index of its device


@dataclass(frozen=True)
class RankInfo:
    """This process among the ranks, and where they join."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int  # ranks on this host
    address: str  # of rank 0's host
    port: int
    launcher: str  # "torch" (DeepSpeed's launcher or torchrun), "slurm", or "none"

    def environment(self) -> dict[str, str]:
        """The variables that torch and DeepSpeed read, and RANK_ON_HOST."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            RANK_ON_HOST: str(self.local_rank),
            "LOCAL_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def find_rank_info(environment: Mapping[str, str]) -> RankInfo:
    """What the launcher has set, or a single rank on a free port without a launcher. Raises UserError."""
    if "RANK" in environment:
        return _from_torch(environment)
    # Of a step: in a batch script itself Slurm sets SLURM_PROCID and SLURM_NTASKS too.
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _from_slurm(environment)
    return RankInfo(0, 1, 0, 1, "127.0.0.1", free_port(), "none")


def _from_torch(environment: Mapping[str, str]) -> RankInfo:
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(
            f"RANK is {environment['RANK']}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            "set; start megamoe by deepspeed, torchrun or srun, or unset RANK."
        )
    return RankInfo(
        int(environment["RANK"]),
        int(environment["WORLD_SIZE"]),
        int(environment.get("LOCAL_RANK", 0)),
        int(environment.get("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE", 1))),
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        "torch",
    )


def _from_slurm(environment: Mapping[str, str]) -> RankInfo:
    tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    # That all ranks compute alike and no other job or step on the host; below those that systems assign by themselves.
    port = 15_000 + (8 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])) % 15_000
    return RankInfo(
        int(environment["SLURM_PROCID"]),
        int(environment["SLURM_STEP_NUM_TASKS"]),
        int(environment["SLURM_LOCALID"]),
        tasks[int(environment["SLURM_NODEID"])],
        environment.get("MASTER_ADDR") or hosts_of(environment["SLURM_STEP_NODELIST"])[0],
        int(environment.get("MASTER_PORT") or port),
        "slurm",
    )


def tasks_per_node(compressed: str) -> list[int]:
    """Slurm's "2(x3),1" as [2, 2, 2, 1]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", compressed):
        counts += [int(count)] * int(times or 1)
    return counts


def hosts_of(nodes: str) -> list[str]:
    """The hosts of Slurm's "h[1-2,5]", expanded by scontrol. Raises UserError if scontrol fails."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"Slurm's hosts {nodes} cannot be expanded ({error}); set MASTER_ADDR to the first.") from None
    return done.stdout.split()
