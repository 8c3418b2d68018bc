"""Documents to shards: hold some out, encode them, write Megatron's .bin/.idx and the record of all.

A prepared folder holds the shards of its splits (train-00000.bin/.idx, ..., valid-00000.bin/.idx where any text is held
out), tokenizer.json and corpus.json, see `corpus_record.py`. Every document begins with what the tokenizer puts before
a text (of most, nothing), and ends in its end-of-text token.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from megamoe.data.corpus_record import NAME, CorpusRecord, ShardRecord, split_of
from megamoe.data.encoder import Encoder
from megamoe.data.shard_writer import ShardWriter
from megamoe.data.tokenizer import prefix_of
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import write_json

SPLITS = ("train", "valid")
PIECE = 1 << 20  # characters encoded at a time; longer documents are cut at a line's end
BATCH = 1 << 20  # characters handed to the encoder together: more do not stay in the cache


class Piece(NamedTuple):
    """Text that is encoded by itself."""

    split: str
    text: str
    begins: bool  # its document
    ends: bool


def split_documents(documents: Iterable[str], valid_fraction: float) -> Iterator[tuple[str, str]]:
    """("train" or "valid", document) pairs. Every k-th document is held out, k = 1 / valid_fraction.

    With fewer than k documents, the last part of each is held out instead, cut at a line's end where there is one.
    """
    if not valid_fraction:
        yield from (("train", document) for document in documents)
        return
    every = max(round(1 / valid_fraction), 2)
    documents = iter(documents)
    first = list(itertools.islice(documents, every))
    if len(first) == every:
        for number, document in enumerate(itertools.chain(first, documents), start=1):
            yield ("valid" if number % every == 0 else "train"), document
        return
    for document in first:
        cut = int(len(document) * (1 - valid_fraction))
        cut = document.find("\n", cut, -1) + 1 or cut
        if document[:cut].strip() and document[cut:].strip():
            yield "train", document[:cut]
            yield "valid", document[cut:]
        else:
            yield "train", document


def pieces_of(document: str) -> Iterator[str]:
    """A document in pieces that are encoded each by itself, none much longer than PIECE, cut at lines' ends."""
    start = 0
    while len(document) - start > PIECE:
        end = document.find("\n", start + PIECE) + 1 or len(document)
        if end == len(document):
            break
        yield document[start:end]
        start = end
    yield document[start:]


def write_shards(
    documents: Iterable[tuple[str, str]], encode: Encoder, end_id: int, dtype: type, prefix: Path, place: str = ""
) -> dict[str, ShardWriter]:
    """Write ("train" or "valid", text) pairs to PREFIX-train.bin and PREFIX-valid.bin. The caller closes the writers.

    Args:
        end_id: of the token that is put after each document.
        dtype: of `token_dtype`.
        place: of the documents, for errors.

    Raises UserError as `encode`.
    """
    writers = {split: ShardWriter(prefix.with_name(f"{prefix.name}-{split}"), dtype) for split in SPLITS}
    before = prefix_of(encode.tokenizer)
    for batch in _batches(_pieces(documents)):
        try:
            ids, counts = encode([piece.text for piece in batch])
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        begins, ends = np.array([piece[2:] for piece in batch]).T
        ids = np.insert(ids, np.cumsum(counts)[ends], end_id)
        counts = counts + ends
        starts = (np.cumsum(counts) - counts)[begins]
        ids = np.insert(ids, np.repeat(starts, len(before)), np.tile(before, len(starts)).astype(ids.dtype))
        counts = counts + begins * len(before)
        for split, writer in writers.items():
            is_of = np.array([piece.split == split for piece in batch])
            size = sum(_bytes_of(piece.text) for piece in batch if piece.split == split)
            writer.add(ids[np.repeat(is_of, counts)], size, np.cumsum(counts[is_of])[ends[is_of]])
    return writers


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _pieces(documents: Iterable[tuple[str, str]]) -> Iterator[Piece]:
    for split, document in documents:
        texts = list(pieces_of(document))
        for number, text in enumerate(texts):
            yield Piece(split, text, number == 0, number == len(texts) - 1)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def complete(
    folder: Path, tokenizer: Tokenizer, end_id: int, shards: dict[str, list[ShardRecord]], **report: Any
) -> CorpusRecord:
    """Write tokenizer.json and corpus.json next to the shards in `folder`.

    Args:
        report: the other fields of the record.
    """
    own = tokenizer.to_str(pretty=True).encode()
    (folder / "tokenizer.json").write_bytes(own)
    record = CorpusRecord(
        tokenizer_sha256=hashlib.sha256(own).hexdigest(),
        end_of_text=tokenizer.id_to_token(end_id),
        splits={split: split_of(records) for split, records in shards.items() if records},
        **report,
    )
    write_json(folder / NAME, record.model_dump())
    return record
