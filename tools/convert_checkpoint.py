"""Convert a checkpoint: `python tools/convert_checkpoint.py runs/tiny tiny.pt` (or .safetensors, or a folder).

    OUT.pt            a plain state_dict
    OUT.safetensors   the same tensors in one file
    OUT.gguf          a file for llama.cpp, where one of its architectures holds the model
    OUT               a Hugging Face directory, of a class of transformers where one holds the model; with --to
                      safetensors, shards and their index alone

The newest checkpoint of a run that verifies is used. `pretrain.py --init_from OUT` goes the way back.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from megamoe import cli
from megamoe.checkpoint.export import (
    DTYPES,
    Entry,
    entries,
    shards,
    without_mtp,
    write_huggingface,
    write_safetensors,
    write_state_dict,
)
from megamoe.checkpoint.native_export import NativeSource, native_class, write_native
from megamoe.checkpoint.reader import (
    STATE_DICT_ENDINGS,
    Source,
    find_checkpoint,
    model_problems,
    open_source,
    run_record,
)
from megamoe.config import ModelConfig, validate
from megamoe.errors import UserError
from megamoe.hardware import memory_gib

FORMATS = ("state_dict", "safetensors", "huggingface", "gguf")


def choose_format(out: Path, to: str | None) -> str:
    """What to write, from the ending of `out` and --to. Raises UserError if they disagree."""
    endings = {**dict.fromkeys(STATE_DICT_ENDINGS, "state_dict"), ".safetensors": "safetensors", ".gguf": "gguf"}
    ending = endings.get(out.suffix)
    if to is not None and to not in FORMATS:
        raise UserError(f"--to is {to}; use one of {', '.join(FORMATS)}.")
    if to is not None and (ending or to) != to:
        raise UserError(f"--to is {to}, but {out} ends in {out.suffix}; drop one of the two.")
    if to == "state_dict" and ending is None:
        raise UserError(f"--to is state_dict, but {out} has no ending of one; call it {out}.pt.")
    if to == "gguf" and ending is None:
        raise UserError(f"--to is gguf, but {out} has not its ending; call it {out}.gguf.")
    return to or ending or "huggingface"


def model_config(checkpoint: Path) -> ModelConfig:
    """The model's configuration, from the record of its run. Raises UserError."""
    model = run_record(checkpoint).get("model")
    if not isinstance(model, dict):
        raise UserError(
            f"{checkpoint} does not say what model it is of; convert it to a .pt instead, or put the run's run.json "
            "there."
        )
    return validate(ModelConfig, model, f"{checkpoint}: model")


def checked_config(source: Source, checkpoint: Path) -> ModelConfig:
    """The same, where the weights are those of such a model. Raises UserError."""
    config = model_config(checkpoint)
    problems = model_problems(source, config, str(checkpoint))
    if problems:
        raise UserError(*problems)
    return config


def print_plan(groups: list[list[Entry]]) -> None:
    for number, group in enumerate(groups, start=1):
        for entry in group:
            shape = " x ".join(map(str, entry.shape)) or "scalar"
            print(f"{entry.name}  {shape}  {str(entry.dtype).removeprefix('torch.')}  {entry.nbytes:,} bytes")
        print(f"file {number} of {len(groups)}: {len(group)} tensors, {sum(entry.nbytes for entry in group):,} bytes")


def write_directory(
    source: Source, checkpoint: Path, args: argparse.Namespace, dtype: torch.dtype, shard_bytes: int
) -> None:
    """A Hugging Face directory; says of which class, and where none of transformers holds the model, why."""
    config = checked_config(source, checkpoint)
    of_run = checkpoint.parent.parent / "tokenizer.json"
    tokenizer = args.tokenizer or (of_run if of_run.is_file() else None)
    architecture, sentence = native_class(source, config)
    if architecture:
        print(sentence)
        write_native(source, args.out, dtype, shard_bytes, config, architecture, tokenizer, args.keep_mtp)
    else:
        print(f"{sentence}; so the directory brings its own code (trust_remote_code)")
        write_huggingface(source, args.out, dtype, shard_bytes, config, tokenizer, args.keep_mtp)


def under_names_written(source: Source, checkpoint: Path, form: str, keep_mtp: bool) -> Source:
    """The source as the output will call its tensors."""
    if form != "huggingface":
        return source
    config = model_config(checkpoint)
    architecture, _ = native_class(source, config)
    if architecture:
        return NativeSource(source, architecture, config, keep_mtp)
    return source if keep_mtp else without_mtp(source)


def convert_to_gguf(source: Source, checkpoint: Path, args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Write a GGUF file, or with --dry-run list its tensors. Raises UserError."""
    try:
        from megamoe.checkpoint.gguf_file import gguf_entries, write_gguf
    except ModuleNotFoundError as error:
        raise UserError(f"--to gguf needs the package {error.name}; pip install -e '.[gguf]'.") from None
    config = checked_config(source, checkpoint)
    if args.dry_run:
        print_plan([gguf_entries(source, dtype, config)])
        return
    tokenizer = args.tokenizer or checkpoint.parent.parent / "tokenizer.json"
    print(f"llama.cpp's architecture is {write_gguf(source, args.out, dtype, config, tokenizer)}")


def main() -> None:
    parser = cli.Parser(description="Convert a checkpoint to plain weights.")
    parser.add_argument("checkpoint", type=Path, help="folder of a run, or of one checkpoint")
    parser.add_argument("out", type=Path, help="file or folder to write")
    parser.add_argument("--to", help=f"one of {', '.join(FORMATS)}; by default from the ending of OUT")
    parser.add_argument("--dtype", default="fp32", help="fp32 (the masters as they are), bf16 or fp16")
    parser.add_argument("--max_shard_gb", type=float, default=2.0, help="largest safetensors file in a folder, in GB")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to add; by default the one in the run folder")
    parser.add_argument("--keep_mtp", action="store_true", help="write multi-token prediction, which is left out else")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="list names, shapes and bytes, write nothing"
    )
    args = parser.parse()
    started = time.perf_counter()
    form = choose_format(args.out, args.to)
    if args.dtype not in DTYPES:
        raise UserError(f"--dtype is {args.dtype}; use one of {', '.join(DTYPES)}.")
    if not 0 < args.max_shard_gb < math.inf:
        raise UserError(f"--max_shard_gb is {args.max_shard_gb}; give a finite size above 0.")
    if args.out.exists() and not args.dry_run:
        raise UserError(f"{args.out} exists already; choose another output, or remove it.")

    dtype, shard_bytes = DTYPES[args.dtype], int(args.max_shard_gb * 1e9)
    checkpoint = find_checkpoint(args.checkpoint)
    source = open_source(checkpoint, open_files=1)
    if form == "gguf":
        convert_to_gguf(source, checkpoint, args, dtype)
    elif args.dry_run:
        in_one_file = form == "state_dict" or args.out.suffix == ".safetensors"
        everything = entries(under_names_written(source, checkpoint, form, args.keep_mtp), dtype)
        print_plan([everything] if in_one_file else shards(everything, shard_bytes))
    elif form == "state_dict":
        write_state_dict(source, args.out, dtype)
    elif form == "safetensors":
        write_safetensors(source, args.out, dtype, shard_bytes)
    else:
        write_directory(source, checkpoint, args, dtype, shard_bytes)
    if args.dry_run:
        return
    seconds, memory = time.perf_counter() - started, memory_gib(torch.device("cpu"))
    print(f"wrote {args.out} from {checkpoint} in {seconds:.1f} s, {memory:.2f} GiB of memory at most")


if __name__ == "__main__":
    cli.run(main)
