"""Byte-level BPE tokenizers of the `tokenizers` library: train, load, and find the end-of-text token."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megamoe.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# Names that published tokenizers give to the end of a document.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
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


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json. Raises UserError."""
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist; give the path of a tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer {path} cannot be read ({error}); give a tokenizer.json of `tokenizers`.") from None
    tokenizer.no_truncation()  # published files may cut or fill up every text to a model's length
    tokenizer.no_padding()
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a document. Raises UserError if the tokenizer has none."""
    for name in END_OF_TEXT_NAMES:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None:
            return token_id
    raise UserError(f"the tokenizer has none of the end-of-text tokens {', '.join(END_OF_TEXT_NAMES)}; add one to it.")
