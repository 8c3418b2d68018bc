"""Byte-level BPE tokenizers of the `tokenizers` library: train, load, and find the end-of-text token."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megamoe.config.model import MAX_SIZE
from megamoe.utils.errors import UserError, shown
from megamoe.utils.json_files import read_regular

END_OF_TEXT = "<|endoftext|>"
# Names that published tokenizers give to the end of a document.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
UNKNOWN = "\U0010fffe"  # no character; stands for what a tokenizer does not know
SMALLEST_VOCAB = 256 + 1  # the bytes and end-of-text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with `vocab_size` entries, END_OF_TEXT as id 0. Every text can be encoded and decoded.

    A small corpus may hold too few distinct pairs and give fewer entries. Raises UserError below 257 entries.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(
            f"vocab_size is {vocab_size}, but the bytes and end-of-text alone need {SMALLEST_VOCAB}; raise it."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def tokenizer_file(path: Path) -> Path:
    """`path`, or the tokenizer.json in the folder `path`."""
    return path / "tokenizer.json" if path.is_dir() else path


def load_tokenizer(path: Path, vocab_size: int | None = None) -> Tokenizer:
    """Load a tokenizer.json. Raises UserError.

    Args:
        vocab_size: of the model that is to read its tokens; by default, of any.
    """
    if not path.exists():
        raise UserError(f"tokenizer {path} does not exist; give the path of a tokenizer.json.")
    data = read_regular(path, "a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_truncation()  # published files may cut or fill up every text to a model's length
        tokenizer.no_padding()
    except Exception as error:  # the library raises bare Exception
        why = " ".join(str(error).split())
        raise UserError(f"tokenizer {path} cannot be read ({why}); give a tokenizer.json of `tokenizers`.") from None
    largest = vocabulary_of(tokenizer) - 1
    if largest >= (vocab_size or MAX_SIZE):
        raise UserError(
            f"tokenizer {path} has token id {largest}, beyond {'the' if vocab_size else 'any'} model's vocabulary of "
            f"{vocab_size or MAX_SIZE}; use the tokenizer that the preset is sized for, or raise its vocab_size."
        )
    return tokenizer


def vocabulary_of(tokenizer: Tokenizer) -> int:
    """Vocabulary that a model of these tokens needs: the largest id and 1. There may be ids that no token has."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, on all cores. Raises UserError, naming the characters and their place, where no token
    stands for a part of a text: the library drops it, or puts the unknown token there, from which no model learns it.

    The tokenizer is changed meanwhile, so two threads need one each.
    """
    model, error = tokenizer.model, None
    named = hasattr(model, "unk_token")  # Unigram has its number instead
    unknown = model.unk_token if named else _unknown_id(model)
    try:
        if named:
            model.unk_token = UNKNOWN  # which no vocabulary has: the library then refuses what it does not know
        if isinstance(model, models.BPE):
            model._clear_cache()  # of words encoded with losses before
        found = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as raised:  # the library raises bare Exception
        found, error = [], raised
    finally:
        if named:
            model.unk_token = unknown
    if error or (not named and any(unknown in ids for ids in found)):
        _refuse_lost(tokenizer, texts)
    if error:
        raise UserError(f"the tokenizer cannot encode the text ({error}); use one that knows every text.")
    return found


def _unknown_id(model: models.Model) -> int | None:
    """Id that Unigram gives to what it does not know; None where it spells that in bytes, or refuses it."""
    try:
        ids = [token.id for token in model.tokenize(UNKNOWN)]
    except Exception:  # the library raises bare Exception
        return None
    return ids[0] if len(ids) == 1 else None


def _refuse_lost(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Raise UserError for the first part of the texts that no token stands for."""
    described = json.loads(tokenizer.to_str())
    model = described["model"]
    lost = vocabulary_of(tokenizer)
    if isinstance(model["vocab"], list):
        model |= {"vocab": [*model["vocab"], [UNKNOWN, 0.0]], "unk_id": (lost := len(model["vocab"]))}
    else:
        model |= {"vocab": {**model["vocab"], UNKNOWN: lost}, "unk_token": UNKNOWN, "fuse_unk": False}
    marking = Tokenizer.from_str(json.dumps(described))
    marking.encode_special_tokens = tokenizer.encode_special_tokens
    for text in texts:
        encoding = marking.encode(text, add_special_tokens=False)
        if lost not in encoding.ids:
            continue
        start, end = encoding.offsets[encoding.ids.index(lost)]
        what, line, column = text[start:end], text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)
        code_point = f" (U+{ord(what):04X})" if len(what) == 1 else ""
        raise UserError(
            f"the tokenizer has no token for {what!r}{code_point}, character {column} of line {line} of a text, in "
            f"{text[max(start - 20, 0) : end + 20]!r}; use a tokenizer that knows every text, as byte-level BPE does."
        )


def end_of_text_id(tokenizer: Tokenizer, name: str | None = None) -> int:
    """Id of the token that ends a document. Raises UserError if the tokenizer has none.

    Args:
        name: of that token; by default the first of END_OF_TEXT_NAMES that there is.
    """
    names = END_OF_TEXT_NAMES if name is None else (name,)
    for known in names:
        token_id = tokenizer.token_to_id(known)
        if token_id is not None:
            return token_id
    raise UserError(
        f"the tokenizer has no end-of-text token {' or '.join(map(shown, names))}; name one of its own with "
        "--end_of_text."
    )
