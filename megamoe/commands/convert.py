"""Convert a model to the form of another program, which the ending of OUT says."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from megamoe.checkpoint.opening import OpenModel, find_checkpoint, open_source
from megamoe.commands.models import open_given
from megamoe.commands.options import Convert, Form
from megamoe.config.recipe import DTYPES
from megamoe.data.tokenizer import tokenizer_file
from megamoe.formats.export import (
    Entry,
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

FORMS_OF_OPTIONS: dict[str, tuple[Form, ...]] = {  # the forms for which an option says something
    "preset": ("huggingface", "gguf"),
    "tokenizer": ("huggingface", "gguf"),
    "keep_mtp": ("huggingface",),
    "max_shard_gb": ("safetensors", "huggingface"),
}


def choose_format(out: Path, to: Form | None) -> Form:
    """What to write, from the ending of `out` and --to. Raises UserError if they disagree."""
    endings: dict[str, Form] = {".safetensors": "safetensors", ".gguf": "gguf"}
    endings |= dict.fromkeys(STATE_DICT_ENDINGS, "state_dict")
    ending = endings.get(out.suffix)
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


def convert_weights(options: Convert, form: Form) -> Path:
    """To a state_dict or safetensors, for which the model need not be known. Returns where the weights were."""
    path = find_checkpoint(options.model)
    source, dtype = open_source(path, options.ema), DTYPES[options.dtype]
    in_one_file = form == "state_dict" or options.out.suffix == ".safetensors"
    if options.dry_run:
        everything = entries(source, dtype)
        print_plan([everything] if in_one_file else shards(everything, options.shard_bytes))
    elif form == "state_dict":
        write_state_dict(source, options.out, dtype)
    else:
        write_safetensors(source, options.out, dtype, options.shard_bytes)
    return path


def convert_to_directory(model: OpenModel, options: Convert) -> None:
    """To a Hugging Face directory; says of which class, and where none of transformers holds the model, why."""
    source, config, dtype = model.source, model.config, DTYPES[options.dtype]
    if options.keep_mtp and not config.num_nextn_predict_layers:
        raise UserError(f"{options.model} has no multi-token prediction to keep; leave --keep_mtp out.")
    architecture, sentence = native_class(source, config, options.keep_mtp)
    print(sentence if architecture else f"{sentence}; so the directory brings its own code (trust_remote_code)")
    if options.dry_run:
        view = huggingface_view(source, config, options.keep_mtp, architecture)
        print_plan(shards(entries(view, dtype), options.shard_bytes))
        return
    tokenizer = tokenizer_file(options.tokenizer) if options.tokenizer else model.tokenizer
    write_huggingface(
        source, options.out, dtype, options.shard_bytes, config, tokenizer, options.keep_mtp, architecture
    )


def convert_to_gguf(model: OpenModel, options: Convert) -> None:
    """To a file for llama.cpp; says for which of its architectures."""
    try:
        from megamoe.formats.gguf_file import gguf_entries, write_gguf
    except ModuleNotFoundError as error:
        raise UserError(f"--to gguf needs the package {error.name}; pip install 'megamoe[gguf]'.") from None
    if options.dry_run:
        print_plan([gguf_entries(model.source, DTYPES[options.dtype], model.config)])
        return
    tokenizer = tokenizer_file(options.tokenizer) if options.tokenizer else model.tokenizer
    if tokenizer is None:
        raise UserError(f"{options.model} has no tokenizer.json, which a .gguf holds; give one with --tokenizer.")
    name = write_gguf(model.source, options.out, DTYPES[options.dtype], model.config, tokenizer)
    print(f"llama.cpp's architecture is {name}")


def check(options: Convert, form: Form) -> None:
    """Raises UserError for options that the form has no use for, and for an OUT that exists."""
    problems = Problems(
        f"--{option} says nothing of the form {form}; leave it out."
        for option, forms in FORMS_OF_OPTIONS.items()
        if option in options.model_fields_set and form not in forms
    )
    if not options.dry_run:
        problems.attempt(check_absent, options.out)
    problems.refuse()


def convert(options: Convert) -> None:
    started = time.perf_counter()
    form = choose_format(options.out, options.to)
    check(options, form)
    if form in ("state_dict", "safetensors"):
        path = convert_weights(options, form)
    else:
        model = open_given(options)
        path = model.path
        (convert_to_gguf if form == "gguf" else convert_to_directory)(model, options)
    if not options.dry_run:
        seconds, memory = time.perf_counter() - started, memory_gib(torch.device("cpu"))
        print(f"wrote {options.out} from {path} in {seconds:.1f} s, {memory:.2f} GiB of memory at most")
