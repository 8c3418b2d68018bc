"""Check token files once, so that no run has to: it trusts the hashes and the largest id in their record."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from pydantic import Field

from megamoe.config.cli import Options, Positional
from megamoe.data.corpus_record import ShardRecord, shard_record, split_of
from megamoe.data.token_files import Shard, corpus_prefix, has_split, split_record
from megamoe.utils.disk import replace_file
from megamoe.utils.errors import Problems, UserError

PIECE = 1 << 24  # tokens looked at by one thread at a time


class Check(Options):
    corpus: Positional[list[Path]] = Field(description="prepared folders, or prefixes of .bin/.idx pairs")


def read_shard(prefix: Path) -> ShardRecord:
    """What a .bin/.idx pair holds. Raises UserError where they do not fit, or an id is negative."""
    shard = Shard(prefix, None)
    pieces = [shard.read(start, start + PIECE) for start in range(0, shard.index.num_tokens, PIECE)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        smallest, largest = min(threads.map(np.min, pieces)), max(threads.map(np.max, pieces))
    if smallest < 0:
        raise UserError(f"{prefix}.bin holds the id {smallest}; prepare the corpus again.")
    documents = len(shard.index.starts(0, shard.index.num_tokens))
    return shard_record(prefix, documents=documents, tokens=shard.index.num_tokens, largest_id=int(largest))


def end_opens_next(prefix: Path) -> bool:
    """Whether all documents of a pair end with one token, an end-of-text, and do not all begin with one as well."""
    shard = Shard(prefix, None)
    starts = shard.index.starts(0, shard.index.num_tokens)
    firsts, lasts = shard.tokens[starts], shard.tokens[[*(starts[1:] - 1), -1]]
    return bool((lasts == lasts[0]).all() and (firsts != firsts[0]).any())


def check_split(prefix: Path) -> str:
    """What was found, in a line. Raises UserError for damage."""
    record = split_record(prefix)
    if record:
        damaged = Problems()
        for shard in record.shards:
            path = prefix.with_name(shard.name)
            found = damaged.attempt(read_shard, path)
            if found and found != shard.model_copy(update={"bytes": None}):
                damaged.append(f"{path} is not what its record says; prepare the corpus again.")
        damaged.refuse()
    else:
        record = split_of([read_shard(prefix)], end_opens_next(prefix))
        replace_file(Path(f"{prefix}.json"), record.model_dump_json(indent=2) + "\n")
    return (
        f"{prefix}: {record.documents:,} documents, {record.tokens:,} tokens, ids up to "
        f"{max(shard.largest_id for shard in record.shards)}, fingerprint {record.fingerprint}"
    )


def check(options: Check) -> None:
    problems = Problems()
    for path in options.corpus:
        splits = [one for one in ("train", "valid") if path.is_dir() and has_split(path, one)] or ["train"]
        for split in splits:
            line = problems.attempt(check_split, corpus_prefix(str(path), split))
            if line:
                print(line, flush=True)
    problems.refuse()
