"""Turn text into tokens: `python tools/prepare_data.py web=crawl/ books='books/*.parquet' --out data/mine
--vocab_size 16384`.

Inputs are text files, JSON lines (plain, .gz or .zst), parquet, what `datasets` saves, folders of these, and globs.
With --tokenizer an existing tokenizer.json is used, with --vocab_size one is trained on the training split first. A
call that was stopped goes on when it is made again. See docs/data.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from megamoe import __version__
from megamoe.config import cli
from megamoe.data.corpus_record import CorpusRecord
from megamoe.data.encoder import Encoder, compare
from megamoe.data.inputs import input_files, units_of
from megamoe.data.preparation import UnitWriter, assemble, partial_corpus, training_texts
from megamoe.data.selection import Selection, first_occurrences, parse_condition
from megamoe.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    prefix_of,
    tokenizer_file,
    train_tokenizer,
    vocabulary_of,
)
from megamoe.data.worker_pool import run_all
from megamoe.utils.disk import check_absent, replace_file
from megamoe.utils.errors import Problems, UserError, shown

SAMPLE = 1 << 20  # characters of each source on which the fast tokenizer is compared
SHOWN = 3  # documents of a source that a dry run prints


def parse() -> argparse.Namespace:
    """The command line, with `units` and `selection`, what is read, and `given`, a tokenizer. Raises one UserError with
    all problems."""
    parser = cli.Parser(description="Turn text into tokens that pretrain.py reads.")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="[NAME=]PATH",
        help="file, folder or glob of .txt, .md, .text, .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .arrow; corpus.json "
        "counts by NAME",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use, or a folder that holds one")
    parser.add_argument("--end_of_text", metavar="TOKEN", help="its token that ends a document; by default its own")
    parser.add_argument("--vocab_size", type=int, help="train a tokenizer of this many entries instead")
    parser.add_argument(
        "--valid_fraction",
        type=float,
        default=0.05,
        help="share F of the text that is held out: every round(1/F)-th document of each 64 MiB",
    )
    parser.add_argument("--text_key", default="text", help="key of the text in JSON lines, its column in tables")
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="CONDITION",
        help="take only documents with, such as 'score>=0.5' lang=en",
    )
    parser.add_argument("--min_chars", type=int, default=1, help="drop shorter documents")
    parser.add_argument("--max_chars", type=int, help="drop longer documents")
    parser.add_argument("--drop_duplicates", action="store_true", help="keep the first of documents with the same text")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, default=cores, help="that read and encode")
    parser.add_argument(
        "--dry_run", action="store_true", help="show the first documents and their tokens, write nothing"
    )
    return parser.parse(check=check)


def check(args: argparse.Namespace) -> argparse.Namespace:
    problems = Problems()
    if (args.tokenizer is None) == (args.vocab_size is None):
        problems.append("give either --tokenizer FILE or --vocab_size N.")
    elif args.end_of_text is not None and not args.tokenizer:
        problems.append("--end_of_text names a token of --tokenizer; leave it out with --vocab_size.")
    args.given = args.end_id = None
    if args.tokenizer and args.vocab_size is None:
        args.given = problems.attempt(load_tokenizer, tokenizer_file(args.tokenizer))
    if args.given:
        args.end_id = problems.attempt(end_of_text_id, args.given, args.end_of_text)
    if args.valid_fraction and not 0.001 <= args.valid_fraction <= 0.5:
        problems.append(f"valid_fraction is {args.valid_fraction}; give 0, or a number from 0.001 to 0.5.")
    if args.max_chars is not None and args.max_chars < args.min_chars:
        problems.append(f"max_chars is {args.max_chars}, below min_chars, {args.min_chars}; raise it.")
    if args.processes < 1:
        problems.append(f"processes is {args.processes}; give at least 1.")
    problems.attempt(check_absent, args.out)
    where = tuple(problems.attempt(parse_condition, text) for text in args.where)
    args.selection = Selection(args.text_key, where, args.min_chars, args.max_chars)
    sources: dict[str, dict[Path, None]] = {}
    for word in args.inputs:
        named = re.fullmatch(r"([\w.-]+)=(.+)", word)
        path = Path(word)
        name = str(path.with_name(f"*{path.suffix}")) if path.is_file() else word  # a shell's glob is one source
        if named and not path.exists():
            name, path = named[1], Path(named[2])
        sources.setdefault(name, {}).update(dict.fromkeys(problems.attempt(input_files, path) or []))
    problems.refuse()
    args.units = units_of({name: list(files) for name, files in sources.items()}, args.selection.columns)
    if not args.units:
        raise UserError("the corpus is empty: all its files are; give one with text.")
    return args


def main() -> None:
    args = parse()
    if args.dry_run:
        show(args)
        return
    with partial_corpus(args.out, settings_of(args)) as folder:
        sizes = [unit.size for unit in args.units]
        masks: list[Any] = [None] * len(sizes)
        if args.drop_duplicates:
            every = [(unit,) for unit in args.units]
            hashes = run_all(args.selection.hashes, every, sizes, "looking for duplicates", args.processes)
            masks = first_occurrences(hashes)
        file = folder.with_name("tokenizer.json")
        if not file.exists():
            replace_file(file, (args.given or train(args, masks)).to_str())
        tokenizer = load_tokenizer(file)
        end_id = end_of_text_id(tokenizer) if args.end_id is None else args.end_id
        writer = UnitWriter(
            folder, tokenizer.to_str(), is_fast(args, tokenizer), end_id, args.valid_fraction, args.selection
        )
        todo = [number for number in range(len(sizes)) if not writer.record_file(number).exists()]
        if len(todo) < len(sizes):
            print(f"{len(sizes) - len(todo)} of {len(sizes)} units are finished already", flush=True)
        work = [(number, args.units[number], masks[number]) for number in todo]
        run_all(writer.write, work, [sizes[number] for number in todo], "tokenising", args.processes)
        record = assemble(writer, len(sizes), tokenizer)
    report(record)
    print(f"corpus in {args.out}, vocabulary of {vocabulary_of(tokenizer)}")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the tokens depend on, by names for the user."""
    files = [(part, part.file.stat()) for unit in args.units for part in unit.parts]
    read = [(*map(str, part), status.st_size, status.st_mtime_ns) for part, status in files]
    names = ("vocab_size", "text_key", "where", "min_chars", "max_chars", "valid_fraction")
    return {
        "input": sha256(json.dumps([read, args.inputs]).encode()).hexdigest(),
        "version": __version__,  # another may cut units otherwise
        "tokenizer": args.given and sha256(args.given.to_str().encode()).hexdigest(),
        "end_of_text": args.end_id,
        "drop_duplicates": args.drop_duplicates,
        **{name: getattr(args, name) for name in names},
    }


def train(args: argparse.Namespace, masks: list[np.ndarray | None]) -> Tokenizer:
    texts = training_texts(args.units, masks, args.selection, args.valid_fraction)
    with tqdm(texts, desc="training the tokenizer", unit=" documents") as bar:
        return train_tokenizer(bar, args.vocab_size)


def texts_by_source(args: argparse.Namespace) -> dict[str, Iterator[str]]:
    """The documents of each source."""
    by_source = itertools.groupby(args.units, lambda unit: unit.source)
    return {source: itertools.chain.from_iterable(map(args.selection.read, list(units))) for source, units in by_source}


def first_documents(args: argparse.Namespace) -> Iterator[str]:
    """The first documents of each source, SAMPLE characters of it."""
    for texts in texts_by_source(args).values():
        left = SAMPLE
        while left > 0 and (text := next(texts, None)) is not None:
            yield text[:left]
            left -= len(text)


def is_fast(args: argparse.Namespace, tokenizer: Tokenizer) -> bool:
    """Whether fastokens gives the same ids on a sample of the corpus; says so where it does not."""
    documents = list(first_documents(args))  # what cannot be read ends the call, and says nothing of fastokens
    why = compare(tokenizer, documents)
    if why:
        print(f"encoding the slow way, with tokenizers: {why}", file=sys.stderr, flush=True)
    return why is None


def show(args: argparse.Namespace) -> None:
    """Print what would be read, and the first documents of each source with their tokens."""
    for source, texts in texts_by_source(args).items():
        units = [unit for unit in args.units if unit.source == source]
        files = {part.file for unit in units for part in unit.parts}
        size = sum(unit.size for unit in units)
        print(f"{source}: {len(files)} files, {size:,} bytes, {len(units)} units of work")
        for text in itertools.islice(texts, SHOWN):
            print(f"  {shown(text)} ({len(text):,} characters)")
            if args.given:
                ids = [*prefix_of(args.given), *Encoder(args.given)([text])[0]]
                tokens = [f"{shown(args.given.decode([one], skip_special_tokens=False))}:{one}" for one in ids[:12]]
                print(f"    {len(ids):,} tokens and end-of-text: {' '.join(tokens)}")


def report(record: CorpusRecord) -> None:
    for name, split in record.splits.items():
        print(f"{name}: {split.documents} documents, {split.tokens} tokens, {split.bytes} bytes")
    total = sum(source.tokens for source in record.sources)
    for source in record.sources:
        dropped = "".join(f", {count} dropped ({reason})" for reason, count in source.dropped.items())
        rates = f"{source.tokens / total:.1%} of the tokens, {source.bytes / max(source.tokens, 1):.2f} bytes per token"
        print(f"{source.name}: {source.documents} documents, {source.tokens} tokens, {rates}{dropped}")
    print("documents by tokens, in powers of two:", ", ".join(f"{key}: {n}" for key, n in record.lengths.items()))
