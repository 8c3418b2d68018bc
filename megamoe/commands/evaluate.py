"""Evaluate a model on texts, or on tasks of lm-evaluation-harness. Any number of ranks gives the same numbers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.opening import tokenizer_of
from megamoe.commands.models import open_given
from megamoe.commands.options import Evaluate
from megamoe.config.recipe import DTYPES
from megamoe.data.documents import Document, read_set
from megamoe.data.tokenizer import end_of_text_id, load_tokenizer, start_id, tokenizer_file
from megamoe.evaluation.scoring import Share, bits_per_byte, score, windows_of
from megamoe.evaluation.tasks import TaskEvaluator, Tasks, load_tasks
from megamoe.launch.distributed import init_distributed, raise_on_any_rank
from megamoe.launch.exits import end_groups
from megamoe.launch.local import run_ranks
from megamoe.model.decoder import Decoder
from megamoe.utils.errors import Problems
from megamoe.utils.json_files import write_json

SHOWN = 50  # documents of a text that are printed
NO_TASK_VALUES = "the tasks gave no values; see the warning above."


class Inputs:
    """What is evaluated, read and checked."""

    def __init__(self, options: Evaluate, leads: bool):
        """Raises one UserError with all problems.

        Args:
            leads: this rank loads the tasks, for all.
        """
        problems = Problems()
        self.model = open_given(options)
        longest = self.model.config.max_position_embeddings
        self.seq_len: int = options.seq_len or longest
        self.stride: int = options.stride or self.seq_len
        if self.stride > self.seq_len:
            problems.append(f"--stride is {self.stride}, above the window of {self.seq_len} tokens; lower it.")
        file = tokenizer_file(options.tokenizer or tokenizer_of(options.model))
        tokenizer = problems.attempt(load_tokenizer, file, self.model.config.vocab_size)
        problems.refuse()
        end_of_text = end_of_text_id(tokenizer, options.end_of_text)
        self.start: int = start_id(tokenizer, options.end_of_text)
        self.sets: dict[Path, list[Document]] = {
            path: problems.attempt(read_set, path, tokenizer, end_of_text, options.text_key) for path in options.texts
        }
        self.tasks: Tasks | None = None
        if options.tasks and leads:
            self.tasks = problems.attempt(load_tasks, options.tasks, options.task_folder, tokenizer, longest)
        problems.refuse()


def evaluate_set(
    model: Decoder, documents: list[Document], inputs: Inputs, share: Share, device: torch.device
) -> dict[str, Any]:
    """The numbers of each document, and of all. Collective."""
    windows = [
        window
        for number, document in enumerate(documents)
        for window in windows_of(document.ids, inputs.start, inputs.seq_len, inputs.stride, number)
    ]
    windows.sort(key=lambda window: -len(window.ids))  # little to fill up
    nats = score(model, windows, len(documents), share, device)[:, 0].tolist()
    of_each = [
        {"name": document.name, **numbers(own, len(document.ids), document.size)}
        for document, own in zip(documents, nats, strict=True)
    ]
    tokens, size = (sum(each[key] for each in of_each) for key in ("tokens", "bytes"))
    return {**numbers(sum(nats), tokens, size), "documents": of_each}


def numbers(nats: float, tokens: int, size: int) -> dict[str, Any]:
    return {"loss": nats / tokens, "bits_per_byte": bits_per_byte(nats, size), "tokens": tokens, "bytes": size}


def show(path: str, found: dict[str, Any]) -> None:
    documents = found["documents"]
    print(f"{'nats/token':>10} {'bits/byte':>9} {'tokens':>11} {'bytes':>12}  document")
    for one in documents[:SHOWN]:
        print(_line(one, one["name"]))
    if len(documents) > SHOWN:
        print(f"... and {len(documents) - SHOWN:,} further documents, which --json writes")
    print(_line(found, f"{path} in all: {len(documents):,} document{'s' * (len(documents) > 1)}"))


def _line(values: dict[str, Any], name: str) -> str:
    counts = f"{values['tokens']:>11,} {values['bytes']:>12,}"
    return f"{values['loss']:>10.4f} {values['bits_per_byte']:>9.4f} {counts}  {name}"


def evaluate(options: Evaluate) -> None:
    if options.ranks and "RANK" not in os.environ:
        sys.exit(run_ranks(sys.orig_argv[1:], options.ranks))  # this command line, which each of them reads again
    rendezvous, device = init_distributed()
    rank = rendezvous.rank_info.rank
    problems = Problems()
    inputs: Inputs = problems.attempt(Inputs, options, rank == 0)
    raise_on_any_rank(problems)
    share = Share(options.batch_size, rank, rendezvous.rank_info.world_size)
    model = inputs.model.load(DTYPES[options.dtype], device)
    found: dict[str, Any] = {
        "model": str(inputs.model.path), "ema": options.ema, "dtype": options.dtype, "seq_len": inputs.seq_len,
        "stride": inputs.stride, "sets": {},
    }  # fmt: skip
    for path, documents in inputs.sets.items():
        result = found["sets"][str(path)] = evaluate_set(model, documents, inputs, share, device)
        if rank == 0:
            show(str(path), result)
    if options.tasks:
        found["tasks"] = TaskEvaluator(inputs.tasks).run(model, share, device)
        for name, value in found["tasks"].items():  # empty but on rank 0
            print(f"{name}: {value:.4f}")
    if rank == 0 and options.json_file:
        write_json(options.json_file, found)
    # Rank 0 alone has them. The warning has said why there are none.
    raise_on_any_rank([NO_TASK_VALUES] if rank == 0 and options.tasks and not found["tasks"] else [])
    end_groups()
