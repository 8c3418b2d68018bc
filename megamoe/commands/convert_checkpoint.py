"""Convert a model: `python tools/convert_checkpoint.py runs/tiny tiny.pt` (or .safetensors, .gguf, or a folder).

    OUT.pt            a plain state_dict
    OUT.safetensors   the same tensors in one file
    OUT.gguf          a file for llama.cpp, where one of its architectures holds the model
    OUT               a Hugging Face directory, of a class of transformers where one holds the model; with --to
                      safetensors, shards and their index alone

Takes a run (its newest checkpoint that is verified), a checkpoint, a Hugging Face directory, or a file of weights.
`pretrain.py --init_from OUT` goes the way back.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from megamoe.checkpoint.opening import OpenModel, find_checkpoint, open_model, open_source
from megamoe.config import cli
from megamoe.config.recipe import DTYPES
from megamoe.data.tokenizer import tokenizer_file
from megamoe.formats.config_json import find_preset
from megamoe.formats.export import (
    Entry,
    bytes_of_shard,
    entries,
    huggingface_view,
    native_class,
    shards,
    write_huggingface,
    write_safetensors,
    write_state_dict,
)
from megamoe.formats.plain_files import STATE_DICT_ENDINGS
from megamoe.utils.disk import check_absent
from megamoe.utils.errors import Problems, UserError
from megamoe.utils.hardware import memory_gib

FORMATS = ("state_dict", "safetensors", "huggingface", "gguf")
OPTIONS = {  # the forms for which an option says something
    "preset": ("huggingface", "gguf"),
    "tokenizer": ("huggingface", "gguf"),
    "keep_mtp": ("huggingface",),
    "max_shard_gb": ("safetensors", "huggingface"),
}
MAX_SHARD_GB = 2.0


def choose_format(out: Path, to: str | None) -> str:
    """What to write, from the ending of `out` and --to. Raises UserError if they disagree."""
    endings = {**dict.fromkeys(STATE_DICT_ENDINGS, "state_dict"), ".safetensors": "safetensors", ".gguf": "gguf"}
    ending = endings.get(out.suffix)
    if to is not None and to not in FORMATS:
        raise UserError(f"--to is {to}; use one of {', '.join(FORMATS)}.")
    if to is not None and (ending or to) != to:
        raise UserError(f"--to is {to}, but {out} ends in {out.suffix}; drop one of the two.")
    suffix = {"state_dict": ".pt", "gguf": ".gguf"}.get(to or "")
    if suffix and not ending:
        raise UserError(f"--to is {to}, but {out} has not its ending; call it {out}{suffix}.")
    return to or ending or "huggingface"


def print_plan(groups: list[list[Entry]]) -> None:
    for number, group in enumerate(groups, start=1):
        for entry in group:
            shape = " x ".join(map(str, entry.shape)) or "scalar"
            print(f"{entry.name}  {shape}  {str(entry.dtype).removeprefix('torch.')}  {entry.nbytes:,} bytes")
        print(f"file {number} of {len(groups)}: {len(group)} tensors, {sum(entry.nbytes for entry in group):,} bytes")


def convert_weights(args: argparse.Namespace, form: str) -> Path:
    """To a state_dict or safetensors, for which the model need not be known. Returns where the weights were."""
    path = find_checkpoint(args.model)
    source, dtype = open_source(path, args.ema), DTYPES[args.dtype]
    in_one_file = form == "state_dict" or args.out.suffix == ".safetensors"
    if args.dry_run:
        everything = entries(source, dtype)
        print_plan([everything] if in_one_file else shards(everything, shard_bytes(args)))
    elif form == "state_dict":
        write_state_dict(source, args.out, dtype)
    else:
        write_safetensors(source, args.out, dtype, shard_bytes(args))
    return path


def convert_to_directory(model: OpenModel, args: argparse.Namespace) -> None:
    """To a Hugging Face directory; says of which class, and where none of transformers holds the model, why."""
    source, config, dtype = model.source, model.config, DTYPES[args.dtype]
    if args.keep_mtp and not config.num_nextn_predict_layers:
        raise UserError(f"{args.model} has no multi-token prediction to keep; leave --keep_mtp out.")
    architecture, sentence = native_class(source, config, args.keep_mtp)
    print(sentence if architecture else f"{sentence}; so the directory brings its own code (trust_remote_code)")
    if args.dry_run:
        view = huggingface_view(source, config, args.keep_mtp, architecture)
        print_plan(shards(entries(view, dtype), shard_bytes(args)))
        return
    tokenizer = args.tokenizer or model.tokenizer
    write_huggingface(source, args.out, dtype, shard_bytes(args), config, tokenizer, args.keep_mtp, architecture)


def convert_to_gguf(model: OpenModel, args: argparse.Namespace) -> None:
    """To a file for llama.cpp; says for which of its architectures."""
    try:
        from megamoe.formats.gguf_file import gguf_entries, write_gguf
    except ModuleNotFoundError as error:
        raise UserError(f"--to gguf needs the package {error.name}; pip install -e '.[gguf]'.") from None
    if args.dry_run:
        print_plan([gguf_entries(model.source, DTYPES[args.dtype], model.config)])
        return
    tokenizer = args.tokenizer or model.tokenizer
    if tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer.json, which a .gguf holds; give one with --tokenizer.")
    name = write_gguf(model.source, args.out, DTYPES[args.dtype], model.config, tokenizer)
    print(f"llama.cpp's architecture is {name}")


def shard_bytes(args: argparse.Namespace) -> int:
    return bytes_of_shard(MAX_SHARD_GB if args.max_shard_gb is None else args.max_shard_gb)


def check(args: argparse.Namespace, form: str) -> None:
    """Raises UserError for all that is wrong with the options, those that the form has no use for included."""
    problems = Problems()
    if args.dtype not in DTYPES:
        problems.append(f"--dtype is {args.dtype}; use one of {', '.join(DTYPES)}.")
    problems.attempt(shard_bytes, args)
    problems += [
        f"--{option} says nothing of the form {form}; leave it out."
        for option, forms in OPTIONS.items()
        if getattr(args, option) not in (None, False) and form not in forms
    ]
    if not args.dry_run:
        problems.attempt(check_absent, args.out)
    problems.refuse()
    args.tokenizer = args.tokenizer and tokenizer_file(args.tokenizer)


def main() -> None:
    parser = cli.Parser(description="Convert a model to the form of another program.")
    parser.add_argument("model", type=Path, help="a run, a checkpoint, a Hugging Face directory, or a file")
    parser.add_argument("out", type=Path, help="file or folder to write")
    parser.add_argument("--preset", help="of weights that do not say what model they are of")
    parser.add_argument("--to", help=f"one of {', '.join(FORMATS)}; by default from the ending of OUT")
    parser.add_argument("--dtype", default="fp32", help="fp32 (the masters as they are), bf16 or fp16")
    parser.add_argument(
        "--max_shard_gb", type=float, help=f"largest safetensors file, in GB; by default {MAX_SHARD_GB:g}"
    )
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of a run with --ema_decay")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to add; by default the model's own")
    parser.add_argument("--keep_mtp", action="store_true", help="write multi-token prediction, which is left out else")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="list names, shapes and bytes, write nothing"
    )
    args = parser.parse()
    started = time.perf_counter()
    form = choose_format(args.out, args.to)
    check(args, form)
    if form in ("state_dict", "safetensors"):
        path = convert_weights(args, form)
    else:
        model = open_model(args.model, find_preset(args.preset) if args.preset else None, ema=args.ema)
        path = model.path
        (convert_to_gguf if form == "gguf" else convert_to_directory)(model, args)
    if not args.dry_run:
        seconds, memory = time.perf_counter() - started, memory_gib(torch.device("cpu"))
        print(f"wrote {args.out} from {path} in {seconds:.1f} s, {memory:.2f} GiB of memory at most")
