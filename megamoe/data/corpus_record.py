"""corpus.json of a prepared folder: what its shards hold, and the hashes of their files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import Field

from megamoe.config.model import JsonModel, validate
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


def split_of(shards: list[ShardRecord]) -> SplitRecord:
    """The record of a split with these shards."""
    return SplitRecord(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes or 0 for shard in shards) or None,
        shards=shards,
    )


def read_record(folder: Path) -> CorpusRecord | None:
    """That of a prepared folder; None for token files made elsewhere. Raises UserError."""
    file = folder / NAME
    return validate(CorpusRecord, read_json(file), str(file)) if file.exists() else None
