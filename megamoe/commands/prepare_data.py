"""Turn text into tokens: `python tools/prepare_data.py web=crawl/ books='books/*.parquet' --out data/mine
--vocab_size 16384`.

Inputs are text files, JSON lines (plain, .gz or .zst), parquet, what `datasets` saves, folders of these, and globs.
With --tokenizer an existing tokenizer.json is used, with --vocab_size one is trained on the training split first. A
call that was stopped goes on when it is made again. See docs/data.md.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from megamoe.config import cli
from megamoe.data.corpus_record import CorpusRecord
from megamoe.data.encoder import compare
from megamoe.data.index_file import token_dtype
from megamoe.data.inputs import Unit, input_files, units_of
from megamoe.data.preparation import (
    UnitWriter,
    assemble,
    key_of,
    partial_corpus,
    training_texts,
    write_units,
)
from megamoe.data.selection import Selection, first_occurrences, parse_condition
from megamoe.data.tokenizer import (
    encode,
    end_of_text_id,
    load_tokenizer,
    tokenizer_file,
    train_tokenizer,
    vocabulary_of,
)
from megamoe.data.worker_pool import run_all
from megamoe.utils.disk import check_absent, replace_file
from megamoe.utils.errors import Problems, shown

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
    parser.add_argument("--processes", type=int, help="that read and encode; by default one for each core")
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
    args.given = None
    if args.tokenizer and args.vocab_size is None:
        args.given = problems.attempt(load_tokenizer, tokenizer_file(args.tokenizer))
    if args.given:
        problems.attempt(end_of_text_id, args.given, args.end_of_text)
    if args.valid_fraction and not 0.001 <= args.valid_fraction <= 0.5:
        problems.append(f"valid_fraction is {args.valid_fraction}; give 0, or a number from 0.001 to 0.5.")
    if args.max_chars is not None and args.max_chars < max(args.min_chars, 1):
        problems.append(f"max_chars is {args.max_chars}, below min_chars, {args.min_chars}; raise it.")
    args.processes = args.processes or len(os.sched_getaffinity(0))
    if args.processes < 1:
        problems.append(f"processes is {args.processes}; give at least 1.")
    problems.attempt(check_absent, args.out)
    where = [problems.attempt(parse_condition, text) for text in args.where]
    args.selection = Selection(args.text_key, tuple(where), args.min_chars, args.max_chars)
    sources: dict[str, dict[Path, None]] = {}
    for word in args.inputs:
        name, path = _named(word)
        sources.setdefault(name, {}).update(dict.fromkeys(problems.attempt(input_files, path) or []))
    problems.refuse()
    args.units = units_of({name: list(files) for name, files in sources.items()}, args.selection.columns)
    return args


def _named(word: str) -> tuple[str, Path]:
    """(name, path) of a source; a path that has a "=" in it is none with a name."""
    parts = re.fullmatch(r"([\w.-]+)=(.+)", word)
    return (parts[1], Path(parts[2])) if parts and not Path(word).exists() else (word, Path(word))


def main() -> None:
    args = parse()
    if args.dry_run:
        show(args)
        return
    start = time.perf_counter()
    with partial_corpus(args.out, settings_of(args)) as folder:
        masks: list[Any] = [None] * len(args.units)
        if args.drop_duplicates:
            sizes = [unit.size for unit in args.units]
            work = [(unit,) for unit in args.units]
            hashes = run_all(args.selection.hashes, work, sizes, "looking for duplicates", args.processes)
            masks = first_occurrences(hashes)
        file = folder.parent / "tokenizer.json"
        if not file.exists():
            replace_file(file, (args.given or train(args, masks)).to_str(pretty=True))
        tokenizer = load_tokenizer(file)
        end_id = end_of_text_id(tokenizer, args.end_of_text)
        writer = UnitWriter(
            folder=folder,
            tokenizer=file,
            is_fast=is_fast(args, tokenizer),
            end_id=end_id,
            dtype=token_dtype(vocabulary_of(tokenizer)),
            valid_fraction=args.valid_fraction,
            selection=args.selection,
        )
        record = assemble(folder, write_units(writer, args.units, masks, args.processes), tokenizer, end_id)
    for line in report(record):
        print(line)
    seconds = time.perf_counter() - start
    size = sum(source.bytes for source in record.sources)
    print(f"corpus in {args.out}, vocabulary of {vocabulary_of(tokenizer)}; {size / seconds / 1e6:.1f} MB/s of text")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the shards depend on besides their own part of the input, by names for the user."""
    needs_all = args.vocab_size is not None or args.drop_duplicates
    return {
        "tokenizer": args.given and sha256(args.given.to_str().encode()).hexdigest(),
        "input": sha256("".join(map(key_of, args.units)).encode()).hexdigest() if needs_all else None,
        **{name: getattr(args, name) for name in ("vocab_size", "end_of_text", "text_key", "where", "min_chars",
        "max_chars", "valid_fraction", "drop_duplicates")},
    }  # fmt: skip


def train(args: argparse.Namespace, masks: list[np.ndarray | None]) -> Tokenizer:
    with tqdm(
        total=sum(unit.size for unit in args.units), desc="training the tokenizer", unit="B", unit_scale=True
    ) as bar:
        texts = training_texts(args.units, masks, args.selection, args.valid_fraction, bar)
        return train_tokenizer(texts, args.vocab_size)


def first_documents(units: list[Unit], selection: Selection) -> Iterator[tuple[str, str]]:
    """(source, text) of the first documents of each source, SAMPLE characters of it."""
    taken: Counter[str] = Counter()
    for unit in units:
        if taken[unit.source] < SAMPLE:
            for text in selection.read(unit, Counter(), lambda _: None):
                yield unit.source, text[:SAMPLE]
                taken[unit.source] += len(text)
                if taken[unit.source] >= SAMPLE:
                    break


def is_fast(args: argparse.Namespace, tokenizer: Tokenizer) -> bool:
    """Whether fastokens gives the same ids on a sample of the corpus; says so where it does not."""
    why = compare(tokenizer, (text for _, text in first_documents(args.units, args.selection)))
    if why:
        print(f"encoding with tokenizers, the slow way: {why}", file=sys.stderr, flush=True)
    return why is None


def show(args: argparse.Namespace) -> None:
    """Print what would be read, and the first documents of each source with their tokens."""
    tokenizer = args.given
    end = tokenizer and tokenizer.id_to_token(end_of_text_id(tokenizer, args.end_of_text))
    for source, group in itertools.groupby(args.units, lambda unit: unit.source):
        units = list(group)
        files = {part.file for unit in units for part in unit.parts}
        size = sum(unit.size for unit in units)
        print(f"{source}: {len(files)} files, {size:,} bytes, {len(units)} units of work")
        for _, text in itertools.islice(first_documents(units, args.selection), SHOWN):
            print(f"  {shown(text)} ({len(text):,} characters)")
            if tokenizer:
                ids = encode(tokenizer, [text])[0]
                tokens = " ".join(
                    f"{shown(tokenizer.decode([one], skip_special_tokens=False))}:{one}" for one in ids[:12]
                )
                print(f"    {len(ids):,} tokens and {end}: {tokens}")
    if not tokenizer:
        print(f"a tokenizer of {args.vocab_size} entries would be trained")


def report(record: CorpusRecord) -> Iterator[str]:
    """What the corpus holds, line by line."""
    for name, split in record.splits.items():
        each = f", {split.bytes / split.tokens:.2f} bytes per token" if split.bytes else ""
        yield f"{name}: {split.documents} documents, {split.tokens} tokens, {split.bytes} bytes{each}"
    total = sum(source.tokens for source in record.sources)
    for source in record.sources:
        dropped = "".join(f", {count} dropped ({reason})" for reason, count in source.dropped.items())
        share = source.tokens / max(total, 1)
        yield f"{source.name}: {source.documents} documents, {source.tokens} tokens, {share:.1%} of all{dropped}"
    lengths = ", ".join(f"{length}: {count}" for length, count in record.lengths.items())
    yield f"documents by tokens, from each power of two on: {lengths}"
