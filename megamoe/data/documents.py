"""Documents to evaluate a model on, from text or from a prepared corpus, as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from megamoe.data.encoder import pieces_of
from megamoe.data.inputs import input_files
from megamoe.data.readers import is_text
from megamoe.data.selection import read_documents
from megamoe.data.token_files import TokenCorpus, corpus_prefix, has_split
from megamoe.data.tokenizer import encode, load_tokenizer, prefix_of, tokenizer_file, vocabulary_of
from megamoe.utils.errors import UserError


class Document(NamedTuple):
    """The tokens of one document, without the special tokens around it."""

    name: str
    ids: np.ndarray  # (T,), at least one
    size: int  # bytes of its text


def read_set(path: Path, tokenizer: Tokenizer, end_of_text: int, text_key: str) -> list[Document]:
    """The documents at `path`: a text file, a folder of them, JSON lines, or a prepared corpus, by its folder (whose
    held-out split is taken) or by the prefix of a .bin/.idx pair. Raises UserError where there is none.

    Args:
        tokenizer: of the model; a prepared corpus must have been made with it.
        text_key: of JSON lines.
    """
    prefix = corpus_prefix(str(path), "valid")
    is_pair = path.suffix in (".bin", ".idx") or any(Path(f"{path}{end}").is_file() for end in (".bin", ".idx"))
    if is_pair or has_split(prefix.parent, prefix.name) or (path.is_dir() and has_split(path, "train")):
        documents = list(_prepared(prefix, tokenizer, end_of_text))
    else:
        documents = list(_texts(path, tokenizer, text_key))
    if not documents:
        raise UserError(f"{path} holds no document with a token in it; give text.")
    return documents


def _texts(path: Path, tokenizer: Tokenizer, text_key: str) -> Iterator[Document]:
    for file in input_files(path):
        for number, text in enumerate(read_documents([file], text_key), start=1):
            ids = np.concatenate([np.asarray(one, np.int32) for one in encode(tokenizer, list(pieces_of(text)))])
            if len(ids):
                yield Document(str(file) if is_text(file) else f"{file} #{number}", ids, len(text.encode()))


def _prepared(prefix: Path, tokenizer: Tokenizer, end_of_text: int) -> Iterator[Document]:
    _check_same(tokenizer_file(prefix.parent), tokenizer)
    corpus = TokenCorpus(prefix, 1, vocabulary_of(tokenizer))
    before = prefix_of(tokenizer)
    for number, ids in enumerate(corpus.documents(), start=1):
        ids = ids[:-1] if ids[-1] == end_of_text else ids
        ids = ids[len(before) :] if ids[: len(before)].tolist() == before else ids
        if len(ids):
            size = len(tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode())
            yield Document(f"{prefix} #{number}", ids, size)


def _check_same(file: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer next to a corpus, where there is one, must number tokens as the model's."""
    if file.is_file() and load_tokenizer(file).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{file} numbers tokens otherwise than the model's tokenizer; evaluate on the text itself, or prepare the "
            "corpus again with --tokenizer."
        )
