"""A rank without an engine: `pretrain.main` joins, watches, heeds requests to stop and leaves as ever, but what it runs
between is a loop that counts steps and writes their number where a run writes checkpoints.

The launch scripts start it in place of pretrain.py where they lie in a tree of `make_tree`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megamoe import pretrain
from megamoe.launch.distributed import on_any_rank, raise_on_any_rank
from megamoe.launch.stopping import Deadline
from megamoe.monitoring.log_files import write_event

ROOT = Path(__file__).parent.parent
STEP_SECONDS = 0.02
SAVE_SECONDS = 5  # before a time limit

PROGRAM = f"""
import os, sys, time
if "STUB_LOADS" in os.environ:
    time.sleep(1000)
sys.path.insert(1, {str(ROOT / "tests")!r})
import stub_rank
stub_rank.main()
"""


def make_tree(folder: Path) -> Path:
    """The launch scripts and their tools, with a pretrain.py that is this stub; with STUB_LOADS in its environment, it
    never comes to an end of loading Python."""
    shutil.copytree(ROOT / "launch_scripts", folder / "launch_scripts")
    (folder / "tools").symlink_to(ROOT / "tools")
    (folder / "megamoe").mkdir()
    (folder / "megamoe" / "pretrain.py").write_text(PROGRAM)
    return folder


def main(before_step: Callable[[int], None] = lambda step: None) -> None:
    """pretrain.py with a loop for a run.

    Args:
        before_step: called with the number of each step.
    """

    def run(job: Any, store: Any, position: Any, stop: Any) -> bool:
        return count_steps(job.run, position, stop, before_step)

    pretrain.check, pretrain.is_done, pretrain.run = check, lambda job: False, run
    pretrain.main()


def check(config: Any, problems: Any, device: torch.device, is_first_on_host: bool) -> Any:
    raise_on_any_rank(problems)
    return SimpleNamespace(run=config)


def count_steps(config: Any, position: Any, stop: Any, before_step: Callable[[int], None]) -> bool:
    """Returns whether the last step was reached. Prints and saves as a run does."""
    folder = Path(config.run_dir)
    latest = folder / "checkpoints" / "latest"
    first = int(latest.read_text().removeprefix("step_")) if config.auto_resume and latest.exists() else 0
    deadline = Deadline(config.time_limit, os.environ)
    say = print if dist.get_rank() == 0 else lambda *words, **options: None
    say(f"{dist.get_world_size()} ranks, ep_size {config.ep_size}; steps {first} to {config.steps}", flush=True)
    if dist.get_rank() == 0:
        latest.parent.mkdir(parents=True, exist_ok=True)
        write_event(folder, "resume" if first else "start", first, {})
    for step in range(first + 1, config.steps + 1):
        position.at("reading data", step)
        before_step(step)
        time.sleep(STEP_SECONDS)
        asked, out_of_time = on_any_rank(stop.asked, deadline.within(SAVE_SECONDS), device=torch.device("cpu"))
        say(f"step={step} avg_loss=0", flush=True)
        if dist.get_rank() == 0:
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps({"kind": "train", "step": step, "loss": 0.0}) + "\n")
            if (
                asked
                or out_of_time
                or step == config.steps
                or (config.save_interval and not step % config.save_interval)
            ):
                save(latest, step)
        if asked or out_of_time:
            how = "by a signal" if asked else "before the time limit"
            say(f"stopped {how} after step {step}; continue with --resume", flush=True)
            return False
    return True


def save(latest: Path, step: int) -> None:
    """What the scripts look for."""
    checkpoint = latest.with_name(f"step_{step}")
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "index.json").write_text("{}")
    latest.with_name(".new").write_text(checkpoint.name)
    latest.with_name(".new").replace(latest)
    print(f"saved {checkpoint}", flush=True)
