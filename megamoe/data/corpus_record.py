"""corpus.json of a prepared folder: what its shards hold, and the hashes of their files.

The folder holds the shards of its splits (train-00000.bin/.idx, ..., valid-00000.bin/.idx where any text is held out),
tokenizer.json and corpus.json.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field
from tokenizers import Tokenizer

from megamoe.config.model import JsonModel, validate
from megamoe.data.tokenizer import prefix_of
from megamoe.utils.disk import file_sha256, replace_file
from megamoe.utils.json_files import read_json

NAME = "corpus.json"


class ShardRecord(JsonModel):
    """A .bin/.idx pair, and .sums."""

    name: str
    """Of both files, without their endings."""
    documents: int = Field(ge=0)
    tokens: int = Field(gt=0)
    bytes: int | None = Field(default=None, gt=0)
    """Of the text; not known of token files made elsewhere."""
    largest_id: int = Field(ge=0)
    """Of all ids, which were checked one by one."""
    bin_sha256: str
    idx_sha256: str
    sums_sha256: str | None = None
    """Of the hashes of the .bin's blocks, which an object store needs."""


class SplitRecord(JsonModel):
    """Shards one after another."""

    documents: int = Field(default=0, ge=0)
    tokens: int = Field(gt=0)
    bytes: int | None = Field(default=None, gt=0)
    end_opens_next: bool = False
    """The token that ends a document also is the first that the next one reads, for nothing else stands before it."""
    shards: list[ShardRecord] = Field(min_length=1)

    @property
    def fingerprint(self) -> str:
        """Of all tokens and all borders of documents."""
        hashes = [one for shard in self.shards for one in (shard.bin_sha256, shard.idx_sha256)]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


class SourceRecord(JsonModel):
    """What came of one of the inputs."""

    name: str
    documents: int = Field(ge=0)
    """Of both splits: a document whose last part is held out counts in both."""
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)
    dropped: dict[str, int]
    """Documents by the reason: "where", "empty", "short", "long", "duplicate"."""


class CorpusRecord(JsonModel):
    """A prepared folder."""

    tokenizer_sha256: str | None = None
    """Of the tokenizer.json next to it."""
    end_of_text: str | None = None
    """The token that ends each document."""
    splits: dict[str, SplitRecord]
    sources: list[SourceRecord] = Field(default_factory=list)
    lengths: dict[str, int] = Field(default_factory=dict)
    """Documents by their tokens, "256" for those from 256 on and below 512."""


def shard_record(prefix: Path, **counts: Any) -> ShardRecord:
    """The record of a pair, with the hashes of its files."""
    files = {end: Path(f"{prefix}.{end}") for end in ("bin", "idx", "sums")}
    hashes: dict[str, Any] = {f"{end}_sha256": file_sha256(file) for end, file in files.items() if file.exists()}
    return ShardRecord(name=prefix.name, **counts, **hashes)


def totals(shards: list[ShardRecord]) -> dict[str, Any]:
    """What shards hold together."""
    return {
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "bytes": sum(shard.bytes or 0 for shard in shards),
    }


def split_of(shards: list[ShardRecord], end_opens_next: bool = False) -> SplitRecord:
    """The record of a split with these shards."""
    known = totals(shards)
    known["bytes"] = known["bytes"] or None
    return SplitRecord(**known, end_opens_next=end_opens_next, shards=shards)


def read_record(folder: Path) -> CorpusRecord | None:
    """That of a prepared folder; None for token files made elsewhere. Raises UserError."""
    file = folder / NAME
    return validate(CorpusRecord, read_json(file), str(file)) if file.exists() else None


def write_corpus_record(
    folder: Path, tokenizer: Tokenizer, end_id: int, shards: dict[str, list[ShardRecord]], **report: Any
) -> CorpusRecord:
    """Write tokenizer.json and corpus.json next to the shards in `folder`; `report` are other fields of the record."""
    own = tokenizer.to_str(pretty=True)
    replace_file(folder / "tokenizer.json", own)
    record = CorpusRecord(
        tokenizer_sha256=hashlib.sha256(own.encode()).hexdigest(),
        end_of_text=tokenizer.id_to_token(end_id),
        splits={split: split_of(records, not prefix_of(tokenizer)) for split, records in shards.items() if records},
        **report,
    )
    replace_file(folder / NAME, json.dumps(record.model_dump(), indent=2) + "\n")
    return record
