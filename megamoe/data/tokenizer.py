"""Tokenizers of the `tokenizers` library: train byte-level BPE, load any, encode and decode, find the special tokens.

What tokenizer.json puts before a text (`prefix_of`) begins each document of a corpus and each prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megamoe.config.model import MAX_SIZE
from megamoe.utils.errors import UserError, shown
from megamoe.utils.json_files import read_json, read_regular

END_OF_TEXT = "<|endoftext|>"
# Names that published tokenizers give to the end of a document.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<｜end▁of▁sentence｜>")
# Where the end of a document is declared next to a tokenizer.json, of a corpus, a run, or a published directory.
DECLARED = (
    ("corpus.json", "end_of_text"), ("run.json", "end_of_text"), ("tokenizer_config.json", "eos_token"),
    ("generation_config.json", "eos_token_id"), ("config.json", "eos_token_id"),
)  # fmt: skip
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
    """Load a tokenizer.json, with what the files next to it say of its special tokens. Raises UserError.

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
    if path.name == "tokenizer.json":
        tokenizer.end_of_text = _declared_end(tokenizer, path)  # type: ignore[attr-defined]
    return tokenizer


def _declared_end(tokenizer: Tokenizer, path: Path) -> str | None:
    values = {name: read_json(file) for name, _ in DECLARED if (file := path.with_name(name)).is_file()}
    declared = (known_token(values[name].get(key), tokenizer) for name, key in DECLARED if name in values)
    return next(filter(None, declared), None)


def known_token(value: Any, tokenizer: Tokenizer) -> str | None:
    """A token in the forms of published files: its text, an object with it, an id or a list of ids, of which the first
    counts. None where the tokenizer has it not."""
    value = value[0] if isinstance(value, list) and value else value
    value = value.get("content") if isinstance(value, dict) else value
    if isinstance(value, int):
        return tokenizer.id_to_token(value) if 0 <= value < MAX_SIZE else None
    return value if isinstance(value, str) and tokenizer.token_to_id(value) is not None else None


def prefix_of(tokenizer: Tokenizer) -> list[int]:
    """Ids that the tokenizer puts before a text, such as Llama 3's <|begin_of_text|>; of most, none."""
    text = tokenizer.encode("", add_special_tokens=False)
    text.pad(1, pad_id=MAX_SIZE)  # beyond all ids
    ids = tokenizer.post_process(text).ids
    return ids[: ids.index(MAX_SIZE)]


def vocabulary_of(tokenizer: Tokenizer) -> int:
    """Vocabulary that a model of these tokens needs: the largest id and 1. There may be ids that no token has."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, on all cores. Raises UserError, naming the characters and their place, where no token
    stands for a part of a text: the library drops it, or puts the unknown token there, from which no model learns it.

    The tokenizer is changed meanwhile, so two threads need one each.
    """
    model = tokenizer.model
    named = hasattr(model, "unk_token")  # Unigram has its number instead
    unknown = model.unk_token if named else _unknown_id(model)
    try:
        if named:
            model.unk_token = UNKNOWN  # which no vocabulary has: the library then refuses what it does not know
        if isinstance(model, models.BPE):
            model._clear_cache()  # of words encoded with losses before
        found = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except TypeError as error:  # half of a surrogate pair
        raise UserError(f"the tokenizer cannot encode what is no text ({error}); give valid UTF-8.") from None
    except Exception as error:  # the library raises bare Exception
        _refuse_lost(tokenizer, texts)
        raise UserError(f"the tokenizer cannot encode the text ({error}); use one that knows every text.") from None
    finally:
        if named:
            model.unk_token = unknown
    if not named and any(unknown in ids for ids in found):
        _refuse_lost(tokenizer, texts)
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
    model, vocab, lost = described["model"], described["model"]["vocab"], MAX_SIZE  # which no added token has
    if isinstance(vocab, list):
        lost = model["unk_id"] = len(vocab)
        vocab.append([UNKNOWN, 0.0])
    else:
        vocab[UNKNOWN] = lost
        model |= {"unk_token": UNKNOWN, "fuse_unk": False}
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


def encode_prompts(tokenizer: Tokenizer, prompts: list[str]) -> list[list[int]]:
    """Token ids of texts that are continued, as a document begins. Raises UserError as `encode`."""
    prefix = prefix_of(tokenizer)
    return [prefix + ids for ids in encode(tokenizer, prompts)]


def decode_continuation(tokenizer: Tokenizer, prompt: list[int], added: list[int]) -> str:
    """The text that the ids add to a prompt; with a space first where SentencePiece drops that of a text alone."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *added])
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(added)


def end_of_text_of(tokenizer: Tokenizer) -> str | None:
    """The token that ends a document: the declared one, or else the first of END_OF_TEXT_NAMES that there is."""
    names = (getattr(tokenizer, "end_of_text", None), *END_OF_TEXT_NAMES)
    return next((name for name in names if name and tokenizer.token_to_id(name) is not None), None)


def end_of_text_id(tokenizer: Tokenizer, name: str | None = None) -> int:
    """Id of the token that ends a document. Raises UserError if the tokenizer has none.

    Args:
        name: of that token; by default that of `end_of_text_of`.
    """
    known = end_of_text_of(tokenizer) if name is None else name
    token_id = None if known is None else tokenizer.token_to_id(known)
    if token_id is None:
        names = END_OF_TEXT_NAMES if name is None else (name,)
        raise UserError(
            f"the tokenizer has no end-of-text token {' or '.join(map(shown, names))}; name one of its own with "
            "--end_of_text, or as eos_token in a tokenizer_config.json next to it."
        )
    return token_id


def start_id(tokenizer: Tokenizer, name: str | None = None) -> int:
    """Id of the token that a text stands behind: that of the name, else the last of `prefix_of`, else end-of-text."""
    prefix = prefix_of(tokenizer) if name is None else []
    return prefix[-1] if prefix else end_of_text_id(tokenizer, name)
