"""Text to tokens: read documents, hold some out, encode on all cores, write Megatron's .bin/.idx.

A prepared folder holds the shards of its splits (train-00000.bin/.idx, ..., valid-00000.bin/.idx where any text is held
out), tokenizer.json and corpus.json, see `corpus_record.py`. Every document begins with what the tokenizer
puts before a text (of most, nothing), and ends in its end-of-text token.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tokenizers import Tokenizer

from megamoe.data.corpus_record import NAME, CorpusRecord, split_of
from megamoe.data.index_file import token_dtype
from megamoe.data.shard_writer import ShardWriter
from megamoe.data.tokenizer import encode, end_of_text_id, prefix_of, vocabulary_of
from megamoe.utils.disk import output
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import check_regular, write_json

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXT_SUFFIXES = (".txt", ".md", ".text")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PIECE = 1 << 20  # characters encoded at a time; longer documents are cut at a line's end
BATCH = 16 << 20  # characters handed to the encoder's threads together

Progress = Callable[[int], Any]  # called with the number of input bytes just read


def input_files(path: Path) -> list[Path]:
    """The readable files at `path`: itself, or all in the folder below it, in order. Raises UserError if none."""
    suffixes = TEXT_SUFFIXES + JSONL_SUFFIXES
    if not path.exists():
        raise UserError(f"corpus {path} does not exist; give a text file, a folder, or JSON lines.")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(suffixes))
    if not files:
        raise UserError(f"corpus {path} holds no file that ends in {', '.join(suffixes)}; give a folder that does.")
    for file in files:
        check_regular(file, "text")
    return files


def read_documents(files: Iterable[Path], text_key: str, progress: Progress) -> Iterator[str]:
    """The non-empty documents in `files`: a text file is one document, a line of JSON lines is one.

    Raises UserError, naming file and place, for undecodable bytes, broken JSON or a line without `text_key`.
    """
    for file in files:
        done = 0
        try:
            with open(file, "rb") as raw:
                for text in _documents(file, _unpacked(raw, file.suffix), text_key):
                    yield text
                    progress(raw.tell() - done)
                    done = raw.tell()
                progress(raw.tell() - done)
        except (OSError, EOFError, zlib.error, zstd.ZstdError) as error:
            raise UserError(f"{file}: cannot be read ({error}); replace the file.") from None


def _unpacked(raw: IO[bytes], suffix: str) -> Any:
    return gzip.GzipFile(fileobj=raw) if suffix == ".gz" else zstd.ZstdFile(raw) if suffix == ".zst" else raw


def _documents(file: Path, stream: IO[bytes], text_key: str) -> Iterator[str]:
    if file.name.endswith(JSONL_SUFFIXES):
        yield from _json_lines(file, stream, text_key)
    elif (text := _decode(stream.read(), file, "")).strip():
        yield text


def _json_lines(file: Path, stream: IO[bytes], text_key: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        place = f" in line {number}"
        try:
            record = json.loads(_decode(line, file, place))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: line {number} is not JSON ({error}); fix or remove it.") from None
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{file}: line {number} has no text under "{text_key}"; name the key with --text_key.')
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{file}: line {number} holds half of a surrogate pair, which is no character; remove it.")
        if text.strip():
            yield text


def _decode(data: bytes, file: Path, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: byte 0x{data[error.start]:02x} at offset {error.start}{place} is not UTF-8; "
            "convert the file to UTF-8."
        ) from None


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


def _pieces(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, bool]]:
    """(split, text, ends its document) of every piece."""
    for split, document in documents:
        *first, last = pieces_of(document)
        yield from ((split, piece, False) for piece in first)
        yield split, last, True


def _batches(pieces: Iterable[tuple[str, str, bool]]) -> Iterator[list[tuple[str, str, bool]]]:
    batch: list[tuple[str, str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_corpus(
    documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, out: Path, end_of_text: str | None = None
) -> CorpusRecord:
    """Encode ("train" or "valid", text) pairs into the folder `out`, which appears only when it is complete.

    Args:
        end_of_text: name of the token that ends a document; by default one that is known.

    Returns documents, tokens and bytes of each split. Raises UserError if `out` exists or there is no training text.
    """
    end_id = end_of_text_id(tokenizer, end_of_text)
    tokenizer.encode_special_tokens = True  # the name of a special token in a text is text
    dtype, prefix, begins = token_dtype(vocabulary_of(tokenizer)), prefix_of(tokenizer), True
    with output(out) as partial:
        partial.mkdir()
        writers = {split: ShardWriter(partial / f"{split}-00000", dtype) for split in ("train", "valid")}
        for batch in _batches(_pieces(documents)):
            encoded = encode(tokenizer, [text for _, text, _ in batch])
            for (split, text, ends), ids in zip(batch, encoded, strict=True):
                writers[split].add([*prefix * begins, *ids, *[end_id] * ends], len(text.encode()), ends)
                begins = ends
        shards = {split: writer.close() for split, writer in writers.items()}
        if not shards["train"]:
            raise UserError("the corpus is empty: no document holds any text; give one that does.")
        own = tokenizer.to_str(pretty=True).encode()
        (partial / "tokenizer.json").write_bytes(own)
        record = CorpusRecord(
            tokenizer_sha256=hashlib.sha256(own).hexdigest(),
            end_of_text=tokenizer.id_to_token(end_id),
            splits={split: split_of([shard]) for split, shard in shards.items() if shard},
        )
        write_json(partial / NAME, record.model_dump())
    return record
