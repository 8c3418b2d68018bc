"""Turn text into tokens. A call that was stopped goes on when it is made again. See docs/reference/data.md."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from tokenizers import Tokenizer

from megamoe import __version__
from megamoe.config.cli import Positional
from megamoe.data.corpus_record import CorpusRecord
from megamoe.data.encoder import Encoder, compare
from megamoe.data.inputs import Unit, input_files, units_of
from megamoe.data.preparation import UnitWriter, assemble, partial_corpus, training_texts
from megamoe.data.selection import Selection, without_duplicates
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


class Prepare(Selection):
    inputs: Positional[list[str]] = Field(
        description="PATH or NAME=PATH: a file, folder or glob of .txt, .md, .text, .jsonl, .jsonl.gz, .jsonl.zst, "
        ".parquet or .arrow; corpus.json counts by NAME"
    )
    out: Path = Field(description="folder to make")
    tokenizer: Path | None = Field(default=None, description="tokenizer.json to use, or a folder that holds one")
    end_of_text: str | None = Field(default=None, description="its token that ends a document; by default its own")
    vocab_size: int | None = Field(
        default=None, description="train a tokenizer of this many entries on the training split instead"
    )
    drop_duplicates: bool = Field(default=False, description="keep the first of documents with the same text")
    processes: int = Field(default=len(os.sched_getaffinity(0)), ge=1, description="that read and encode")
    dry_run: bool = Field(default=False, description="show the first documents and their tokens, write nothing")


class Work(NamedTuple):
    """A call whose input has been looked at."""

    options: Prepare
    units: list[Unit]
    tokenizer: Tokenizer | None  # that is given
    end_id: int


def check(options: Prepare) -> Work:
    """Raises one UserError with all problems."""
    problems, tokenizer, end_id = Problems(), None, 0  # the one that a trained tokenizer has
    if (options.tokenizer is None) == (options.vocab_size is None):
        problems.append("give either --tokenizer FILE or --vocab_size N.")
    elif options.tokenizer:
        tokenizer = problems.attempt(load_tokenizer, tokenizer_file(options.tokenizer))
        end_id = tokenizer and problems.attempt(end_of_text_id, tokenizer, options.end_of_text)
    elif options.end_of_text is not None:
        problems.append("--end_of_text names a token of --tokenizer; leave it out with --vocab_size.")
    problems.attempt(check_absent, options.out)
    sources: dict[str, dict[Path, None]] = {}
    for word in options.inputs:
        name, path = source_of(word)
        sources.setdefault(name, {}).update(dict.fromkeys(problems.attempt(input_files, path) or []))
    problems.refuse()
    units = units_of({name: list(files) for name, files in sources.items()}, options.columns)
    if not units:
        raise UserError("the corpus is empty: all its files are; give one with text.")
    return Work(options, units, tokenizer, end_id)


def source_of(word: str) -> tuple[str, Path]:
    """Name and path of an input. What the shell makes of a glob is one source."""
    path = Path(word)
    named = re.fullmatch(r"([\w.-]+)=(.+)", word)
    if named and not path.exists():
        return named[1], Path(named[2])
    return str(path.with_name(f"*{path.suffix}")) if path.is_file() else word, path


def prepare(options: Prepare) -> None:
    work = check(options)
    units = work.units
    if options.dry_run:
        show(work)
        return
    with partial_corpus(options.out, settings_of(work)) as folder:
        if options.drop_duplicates:
            hashes = run_all(options.hashes, units, "looking for duplicates", options.processes)
            units = without_duplicates(units, hashes)
        file = folder.with_name("tokenizer.json")
        if not file.exists():
            tokenizer = work.tokenizer or train_tokenizer(training_texts(units, options), options.vocab_size or 0)
            replace_file(file, tokenizer.to_str())
        described = file.read_text()
        writer = UnitWriter(folder, described, can_be_fast(work, described), work.end_id, options)
        todo = [unit for unit in units if not writer.record_file(unit).exists()]
        if len(todo) < len(units):
            print(f"{len(units) - len(todo)} of {len(units)} units are finished already", flush=True)
        run_all(writer.write, todo, "tokenising", options.processes)
        record = assemble(writer, units)
    report(record)
    print(f"corpus in {options.out}, vocabulary of {vocabulary_of(Tokenizer.from_str(described))}")


def settings_of(work: Work) -> dict[str, Any]:
    """What the tokens depend on, by names for the user."""
    files = [(part, part.file.stat()) for unit in work.units for part in unit.parts]
    read = [(*map(str, part), status.st_size, status.st_mtime_ns) for part, status in files]
    return {
        **work.options.model_dump(mode="json", exclude={"inputs", "out", "processes", "dry_run", "verbose"}),
        "input": sha256(json.dumps([read, work.options.inputs]).encode()).hexdigest(),
        "version": __version__,  # another may cut units otherwise
        "tokenizer": work.tokenizer and sha256(work.tokenizer.to_str().encode()).hexdigest(),
        "end_of_text": work.end_id,
    }


def by_source(work: Work) -> Iterator[tuple[list[Unit], Iterator[str]]]:
    """The units of each source, and their documents."""
    for _, own in itertools.groupby(work.units, lambda unit: unit.source):
        units = list(own)
        yield units, itertools.chain.from_iterable(map(work.options.read, units))


def can_be_fast(work: Work, tokenizer: str) -> bool:
    """Whether fastokens gives the same ids on a sample of each source; says so where it does not."""
    documents = []  # what cannot be read ends the call, and says nothing of fastokens
    for _, texts in by_source(work):
        left = SAMPLE
        while left > 0 and (text := next(texts, None)):
            documents.append(text[:left])
            left -= len(text)
    why = compare(Tokenizer.from_str(tokenizer), documents)
    if why:
        print(f"encoding with tokenizers: {why}", file=sys.stderr, flush=True)
    return why is None


def show(work: Work) -> None:
    """Print what would be read, and the first documents of each source with their tokens."""
    tokenizer = work.tokenizer
    for units, texts in by_source(work):
        files, size = {part.file for unit in units for part in unit.parts}, sum(unit.size for unit in units)
        print(f"{units[0].source}: {len(files)} files, {size:,} bytes, {len(units)} units of work")
        for text in itertools.islice(texts, SHOWN):
            print(f"  {shown(text)} ({len(text):,} characters)")
            if tokenizer:
                ids = [*prefix_of(tokenizer), *Encoder(tokenizer)([text])[0]]
                tokens = [f"{shown(tokenizer.decode([one], skip_special_tokens=False))}:{one}" for one in ids[:12]]
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
