"""How a run ended, told by whoever sees it first: the rank that reports it, `megamoe train`, or the next start."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

from psutil import Process

from megamoe.launch.codes import FAILED, INTERRUPTED, LOST, REFUSED, RESUME, STOPPED
from megamoe.monitoring.alerts import Alerts
from megamoe.monitoring.log_files import ENDS, last_sign, read_events, read_log, write_event
from megamoe.monitoring.sink import Sink
from megamoe.utils.bounded import within

KINDS = {FAILED: "error", REFUSED: "error", STOPPED: "stop", INTERRUPTED: "stop"}  # by exit code; any other is a death
SECONDS = 1.0  # for a look at a disk that may hang


def tell_failure(alerts: Alerts, run_dir: Path, step: int, message: str, code: int, dead: Collection[int] = ()) -> None:
    """Record and send that this job has failed, unless another rank has done so; takes seconds at most.

    Args:
        message: as printed; the error in it is recorded.
        dead: the ranks that have died.
    """
    event = "stall" if code == LOST and not dead else KINDS.get(code, "death")
    lines = message.splitlines()
    error = next((line for line in lines if line.startswith("error: ")), lines[-1])
    values = {"reason": error.removeprefix("error: ").removesuffix(RESUME), "code": code, "ranks": list(dead)}
    events = within(SECONDS, read_events, run_dir) or []
    ours = {one["event"] for one in events if one["time"] >= Process().create_time()}
    if not ours & {*ENDS}:
        within(SECONDS, alerts.log_event, event, step, values)
        if ours:  # else the folder is not entered, and another job may train in it
            within(SECONDS, write_event, run_dir, event, step, values)
        alerts.close()


def tell_unseen_death(sinks: Sink, run_dir: Path) -> None:
    """At a start, record and send that the run was killed, where nothing says how it ended."""
    events = read_events(run_dir)
    if events and events[-1]["event"] not in ENDS:
        reason = "all ranks were killed, or the host lost its power: nothing says how the run ended"
        values = {"time": last_sign(run_dir), "seen": time.time(), "reason": reason}
        sinks.log_event("death", last_step(run_dir), values)


def last_step(run_dir: Path) -> int:
    """The last step that the files of a run tell of."""
    return max((one["step"] for one in [*read_events(run_dir)[-1:], *read_log(run_dir)["train"][-1:]]), default=0)
