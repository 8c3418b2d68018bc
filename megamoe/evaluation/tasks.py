"""Tasks of lm-evaluation-harness on a live model, which all ranks share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer

from megamoe.evaluation.scoring import Share
from megamoe.evaluation.shared_model import SharedModel
from megamoe.model.decoder import Decoder
from megamoe.utils.errors import UserError, first_line


class Tasks(Protocol):
    """Tasks that are loaded, with their data."""

    def evaluate(self, shared: SharedModel) -> dict[str, float]:
        """TASK_METRIC by name."""


def load_tasks(names: Sequence[str], folder: str | None, tokenizer: Tokenizer, max_length: int) -> Tasks:
    """Tasks by their names in lm-evaluation-harness, or in a folder of YAML files that comes first. Raises UserError
    where the package is missing, a task is unknown, or its data cannot be had.

    Args:
        tokenizer: of the model.
        max_length: most tokens that the model reads.
    """
    try:
        from megamoe.evaluation.lm_eval_model import HarnessTasks  # which few runs need, and whose imports take seconds
    except ImportError as error:
        raise UserError(
            f"tasks of lm-evaluation-harness need the package lm_eval ({first_line(error)}); install it with "
            "pip install 'lm-eval>=0.4.13' transformers accelerate."
        ) from None
    return HarnessTasks(list(names), Path(folder) if folder else None, tokenizer, max_length)


@dataclass
class TaskEvaluator:
    """Evaluates tasks on a model, on all ranks."""

    tasks: Tasks | None  # on rank 0; the other ranks need none, and no package
    report: Callable[..., None] = lambda *_, **__: None  # is told where this rank is, as `Position.at` is

    def run(self, model: Decoder, share: Share, device: torch.device) -> dict[str, float]:
        """TASK_METRIC by name on rank 0, nothing elsewhere. Collective; leaves the model in evaluation mode. An error
        in the code of a task is said, and gives no values."""
        shared = SharedModel(model, share, device, self.report)
        if self.tasks is None:
            shared.follow()
            return {}
        try:
            return self.tasks.evaluate(shared)
        except Exception as error:  # of whatever code a task brings
            if shared.has_failed:
                raise
            print(f"warning: the tasks have failed ({first_line(error)}); none is counted.", file=sys.stderr)
            return {}
        finally:
            shared.release()
