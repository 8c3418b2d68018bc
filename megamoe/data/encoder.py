"""Token ids of many texts, by `fastokens` (an extra) where that gives what `tokenizers` gives, else by `tokenizers`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from megamoe.data.index_file import token_dtype
from megamoe.data.tokenizer import encode, prefix_of, vocabulary_of
from megamoe.utils.errors import UserError, first_line

PIECE = 1 << 20  # characters encoded at a time; longer texts are cut at a line's end
# Compared besides documents of the corpus: what implementations of Unicode and of regular expressions disagree on.
ODD_TEXTS = (
    "e\u0301\u0323 \u1e9b\u0323 \ufb01 \u212b \u2126 \u1100\u1161 \u0e33 \u0f73 \U0002f800",
    "\u0130\u0131\u017f\u00df I'\u017f DON'T we'LL",
    "\u200b\u200d\ufeff\u2028\u2029\x85\xa0\u3000 \x00\x01\x1f\x7f \U0010ffff\ue000\ufffd\ufffe",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    " \t\n\r\n  \r\r\n\n x  \n",
    "1234567 1\u00b2\u00bd\u0663\u0967\uff11 3.14e-5 (){}[]<>==!=--->>>___***###",
    "\u4f60\u597d\uff0c\u3053\u3093\ub2c8 \u0645\u0631 \u05e9\u05dc \u0928\u092e\u0938\u094d\u0924\u0947",
    "a" * 5000 + " " * 5000 + "x",
)


class Encoder:
    """Encodes texts with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, is_fast: bool = False):
        """Raises UserError where `is_fast` is asked for, and `fastokens` does not take the tokenizer.

        Args:
            is_fast: encode by `fastokens`, whose ids `compare` has found equal.
        """
        self.tokenizer = tokenizer
        self._fast: Any = None
        self._lost: list[int] = []  # bytes that have no token
        if is_fast:
            self._fast, self._lost = _load_fast(tokenizer)
        self.prefix = prefix_of(tokenizer)
        self.dtype = token_dtype(vocabulary_of(tokenizer))  # of the ids in a file
        tokenizer.encode_special_tokens = True  # the name of a special token in a text is text

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts one after another, number of them in each text). Raises UserError as `encode`, which names
        what the tokenizer has no token for."""
        if max(map(len, texts)) <= PIECE:
            return self._encode(texts)
        pieces = [[self._encode([piece])[0] for piece in pieces_of(text)] for text in texts]
        return np.concatenate(list(itertools.chain(*pieces))), np.array([sum(map(len, ids)) for ids in pieces])

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        with suppress(ValueError):  # a text is beyond the limits of its regular expressions
            if self._fast and not self.loses(texts):
                ids, offsets = self._fast.encode_batch_flat(texts, split_special_tokens=True)
                return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64))
        found = encode(self.tokenizer, texts)
        return np.fromiter(itertools.chain(*found), np.uint32), np.array([len(one) for one in found])

    def loses(self, texts: list[str]) -> bool:
        """Whether `fastokens` would drop some of these in silence."""
        data = "".join(texts).encode() if self._lost else b""
        return any(byte in data for byte in self._lost)


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces that are encoded each by itself, none much longer than PIECE, cut at lines' ends."""
    start = 0
    while len(text) - start > PIECE and (end := text.find("\n", start + PIECE) + 1):
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


@cache
def load_encoder(described: str, is_fast: bool) -> Encoder:
    """The encoder of a tokenizer as JSON, once per process."""
    return Encoder(Tokenizer.from_str(described), is_fast)


def compare(tokenizer: Tokenizer, texts: Iterable[str]) -> str | None:
    """Why `fastokens` is not used; None where it gives the ids of `tokenizers` for these texts, for names of special
    tokens and for ODD_TEXTS."""
    try:
        fast = Encoder(tokenizer, is_fast=True)
    except UserError as error:
        return str(error)
    plain = Encoder(tokenizer)
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for text in [*texts, *ODD_TEXTS, *special, " ".join(special), "x".join(special)]:
        if not fast.loses([text]) and not all(map(np.array_equal, fast([text]), plain([text]))):
            return f"ids of fastokens for {text[:40]!r} differ from those of tokenizers."
    return None


def _load_fast(tokenizer: Tokenizer) -> tuple[Any, list[int]]:
    """(fastokens' tokenizer, bytes that have no token). It drops those in silence, so only byte-level BPE is taken, of
    which they are known. Raises UserError."""
    try:
        import fastokens
    except ImportError:
        raise UserError("fastokens is not installed; pip install 'megamoe[fast]', which is far faster.") from None
    described, lost = tokenizer.to_str(), _bytes_without_token(tokenizer)
    is_byte_level = '"ByteLevel"' in json.dumps(json.loads(described)["pre_tokenizer"])
    if not isinstance(tokenizer.model, models.BPE) or not is_byte_level or (lost and tokenizer.normalizer):
        raise UserError("the tokenizer is no byte-level BPE, and what fastokens loses with another kind is not known.")
    try:
        return fastokens.Tokenizer.from_json_str(described), lost
    except Exception as error:  # the library raises several kinds
        raise UserError(f"fastokens does not take the tokenizer ({first_line(error)}).") from None


def _bytes_without_token(tokenizer: Tokenizer) -> list[int]:
    """GPT-2's letters of bytes: those below 256 stand for themselves, the others for the other bytes, in order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = [ord(letter) for letter in letters if ord(letter) < 256]
    order = own + sorted(set(range(256)) - set(own))
    return [byte for letter, byte in zip(letters, order, strict=True) if tokenizer.token_to_id(letter) is None]
