"""A run goes back to a checkpoint of its own folder, in the same process, and passes over the data since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamoe.checkpoint import folders
from megamoe.checkpoint.index import read_index
from megamoe.checkpoint.restore import restore_first_verified
from megamoe.checkpoint.writer import CheckpointWriter
from megamoe.data.ledger import DataLedger
from megamoe.training.guard import Guard, Return
from megamoe.utils.errors import UserError


def saved_guard(checkpoint: Path) -> dict[str, Any] | None:
    """The guard's state in a checkpoint that is verified; None where it has none. Collective."""
    state: list[Any] = [None]
    if dist.get_rank() == 0 and folders.has_index(checkpoint):
        state = [read_index(checkpoint).guard]
    dist.broadcast_object_list(state)
    return state[0]


def go_back(
    why: Return, step: int, *, writer: CheckpointWriter, guard: Guard, ledger: DataLedger
) -> tuple[DataLedger, dict[str, Any], str]:
    """Restore the engine of `writer` and `guard` from the newest checkpoint that is good; no save is pending.

    Returns the ledger of what follows, which is in the run folder, the event to record, and the line to say.
    Collective. Raises UserError, on every rank, where the run may not go back once more or there is no checkpoint;
    OSError on rank 0.

    Args:
        step: the last one.
    """
    most = guard.config.guard_rollbacks
    if ledger.rollbacks >= most:
        raise UserError(
            f"{why.reason}, and the run has gone back {ledger.rollbacks} times already, with --guard_rollbacks {most}: "
            "training has diverged; lower the peak learning rate, or look at the data that events.jsonl names"
        )
    checkpoint = restore_first_verified(writer.engine, _good(why, writer, ledger))
    if checkpoint is None:
        raise UserError(
            f"{why.reason}, and {writer.folder} holds no checkpoint of step {why.until} or before to go back to; lower "
            "--save_interval, or look at the data that events.jsonl names, and start again"
        )
    to_step = folders.step_of(checkpoint) or 0
    guard.restore(saved_guard(checkpoint), to_step)
    shared = [ledger]
    if dist.get_rank() == 0:
        shared = [ledger.gone_back(to_step, ledger.data_step(step), writer.go_back(checkpoint))]
        shared[0].write(writer.folder.parent)
    dist.broadcast_object_list(shared)
    (ledger,) = shared
    next_data = ledger.data_step(to_step + 1)
    line = (
        f"guard: after step {step}: {why.reason}; the run goes back to {checkpoint}, and step {to_step + 1} reads the "
        f"data of step {next_data}: rollback {ledger.rollbacks} of {most}"
    )
    event = {
        "reason": why.reason,
        "to_step": to_step,
        "checkpoint": checkpoint.name,
        "next_data_step": next_data,
        "rollbacks": ledger.rollbacks,
    }
    return ledger, event, line


def _good(why: Return, writer: CheckpointWriter, ledger: DataLedger) -> list[Path]:
    """The checkpoints that the run may go back to, the newest first; on rank 0."""
    if writer.retention is None:
        return []
    return [
        path
        for path in folders.run_checkpoints(writer.folder, ledger)
        if folders.is_complete(path)
        and (folders.step_of(path) or 0) <= why.until
        and path not in writer.retention.left_behind
    ]
