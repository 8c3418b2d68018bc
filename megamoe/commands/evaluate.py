"""Evaluate a model on texts, `python tools/evaluate.py runs/tiny data/plays`, or on tasks, `... --tasks arc_easy`.

MODEL is a run (its newest checkpoint), a checkpoint, a Hugging Face directory, or a file of weights; TEXT is a text
file, a folder of them, JSON lines, or a prepared corpus (a folder, for its held-out split, or a prefix). Each document
stands behind an end-of-text token, and each of its tokens is predicted once. `deepspeed --num_gpus N tools/evaluate.py
...` shares the work between N ranks and gives the same numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from megamoe.checkpoint.opening import OpenModel, open_model, tokenizer_of
from megamoe.config import cli
from megamoe.config.recipe import DTYPES
from megamoe.data.documents import Document, read_set
from megamoe.data.tokenizer import end_of_text_id, load_tokenizer, start_id, tokenizer_file
from megamoe.evaluation.scoring import Share, bits_per_byte, score, windows_of
from megamoe.evaluation.tasks import TaskEvaluator, Tasks, load_tasks
from megamoe.formats.config_json import find_preset
from megamoe.launch.distributed import init_distributed, raise_on_any_rank
from megamoe.launch.exits import end_groups, leave
from megamoe.model.decoder import Decoder
from megamoe.utils.errors import Problems

SHOWN = 50  # documents of a text that are printed
NO_TASK_VALUES = "the tasks gave no values; see the warning above."


def parse() -> argparse.Namespace:
    parser = cli.Parser(description="Nats per token and bits per byte of a model on texts, or its scores on tasks.")
    parser.add_argument("model", type=Path, help="a run, a checkpoint, a Hugging Face directory, or a file")
    parser.add_argument(
        "texts", type=Path, nargs="*", metavar="TEXT", help="text file, folder, JSON lines, or prepared corpus"
    )
    parser.add_argument("--preset", help="of weights that do not say what model they are of")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of a run with --ema_decay")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; by default the model's own")
    parser.add_argument("--end_of_text", metavar="TOKEN", help="token before a document; by default its own")
    parser.add_argument("--text_key", default="text", help="key of the text in JSON lines")
    parser.add_argument("--seq_len", type=int, help="tokens of a window; by default max_position_embeddings")
    parser.add_argument(
        "--stride", type=int, help="tokens from one window to the next; by default a window, so that none overlap"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="windows per rank and forward pass")
    parser.add_argument(
        "--dtype", default="fp32", help="fp32, bf16 or fp16; in the last two, numbers vary with the batch's shape"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", default=[], help="tasks of lm-evaluation-harness")
    parser.add_argument("--task_folder", help="folder of your own tasks (YAML), found first")
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    parser.add_argument("--local_rank", help="given by the launcher; not used")
    return parser.parse(check=check)


def check(args: argparse.Namespace) -> argparse.Namespace:
    problems = Problems()
    if not args.texts and not args.tasks:
        problems.append("there is nothing to evaluate on; give a TEXT, or --tasks.")
    if args.task_folder and not args.tasks:
        problems.append(f"--task_folder is {args.task_folder}, but no task is asked for; add --tasks.")
    if args.dtype not in DTYPES:
        problems.append(f"--dtype is {args.dtype}; use one of {', '.join(DTYPES)}.")
    for name in ("seq_len", "stride", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} is {value}; give at least 1.")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        problems.append(f"--json is {args.json}; give the path of a file, in a folder that exists.")
    problems.refuse()
    return args


class Inputs:
    """What is evaluated, read and checked."""

    def __init__(self, args: argparse.Namespace, leads: bool):
        """Raises one UserError with all problems.

        Args:
            leads: this rank loads the tasks, for all.
        """
        problems = Problems()
        self.model: OpenModel = problems.attempt(
            lambda: open_model(args.model, find_preset(args.preset) if args.preset else None, ema=args.ema)
        )
        problems.refuse()
        longest = self.model.config.max_position_embeddings
        self.seq_len: int = args.seq_len or longest
        self.stride: int = args.stride or self.seq_len
        if self.stride > self.seq_len:
            problems.append(f"--stride is {self.stride}, above the window of {self.seq_len} tokens; lower it.")
        file = tokenizer_file(args.tokenizer or tokenizer_of(args.model))
        tokenizer = problems.attempt(load_tokenizer, file, self.model.config.vocab_size)
        problems.refuse()
        end_of_text = problems.attempt(end_of_text_id, tokenizer, args.end_of_text)
        problems.refuse()
        self.start: int = start_id(tokenizer, args.end_of_text)
        self.sets: dict[Path, list[Document]] = {
            path: problems.attempt(read_set, path, tokenizer, end_of_text, args.text_key) for path in args.texts
        }
        self.tasks: Tasks | None = None
        if args.tasks and leads:
            self.tasks = problems.attempt(load_tasks, args.tasks, args.task_folder, tokenizer, longest)
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


def main() -> None:
    args = parse()
    rendezvous, device = init_distributed()
    rank = rendezvous.rank_info.rank
    problems = Problems()
    inputs: Inputs = problems.attempt(Inputs, args, rank == 0)
    raise_on_any_rank(problems)
    share = Share(args.batch_size, rank, rendezvous.rank_info.world_size)
    model = inputs.model.load(DTYPES[args.dtype], device)
    found: dict[str, Any] = {
        "model": str(inputs.model.path), "ema": args.ema, "dtype": args.dtype, "seq_len": inputs.seq_len,
        "stride": inputs.stride, "sets": {},
    }  # fmt: skip
    for path, documents in inputs.sets.items():
        result = found["sets"][str(path)] = evaluate_set(model, documents, inputs, share, device)
        if rank == 0:
            show(str(path), result)
    if args.tasks:
        found["tasks"] = TaskEvaluator(inputs.tasks).run(model, share, device)
        for name, value in found["tasks"].items():  # empty but on rank 0
            print(f"{name}: {value:.4f}")
    if rank == 0 and args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    # Rank 0 alone has them. The warning has said why there are none.
    raise_on_any_rank([NO_TASK_VALUES] if rank == 0 and args.tasks and not found["tasks"] else [])
    end_groups()


def run() -> NoReturn:
    """Run `main`, and leave with an exit code that launch_scripts/single_node.sh reads."""
    try:
        cli.run(main)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        leave(int(end.code or 0))
