"""A byte-level BPE tokenizer in the form of a GGUF file.

llama.cpp splits a text into words by a rule of its own code, which the file names: only tokenizers that split by one of
those rules can be written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGUFWriter, SpecialVocab, TokenType
from tokenizers import Tokenizer

from megamoe.config.model import ModelConfig
from megamoe.data.tokenizer import load_tokenizer, prefix_of
from megamoe.formats.tokenizer_files import special_ids
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import read_json


class _Rule(NamedTuple):
    """How llama.cpp splits into words, and whether it looks a word up before it merges its bytes."""

    name: str  # tokenizer.ggml.pre
    ignore_merges: bool


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_2 = _Rule("gpt-2", False)
RULES = {
    _CONTRACTIONS + r"\p{N}" + _REST: _Rule("qwen2", False),
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: _Rule("llama-bpe", True),
}


def add_tokenizer(writer: GGUFWriter, path: Path, config: ModelConfig) -> None:
    """Give a GGUF file the tokenizer.json at `path`. Raises UserError if llama.cpp would tokenise otherwise."""
    loaded = load_tokenizer(path, config.vocab_size)
    described = read_json(path)
    prefix = prefix_of(loaded)
    problem = _problem(described) or (f"puts {len(prefix)} tokens before a text" if len(prefix) > 1 else None)
    if problem:
        raise UserError(
            f"tokenizer {path} {problem}; llama.cpp knows byte-level BPE that splits as GPT-2, Llama 3 or Qwen 2 do, "
            "with one token before a text at most."
        )
    tokens, types = _vocabulary(loaded, described, config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_rule(described["pre_tokenizer"]).name)  # type: ignore[union-attr]
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    )
    adds = {"eos_token_id": writer.add_eos_token_id, "bos_token_id": writer.add_bos_token_id}
    ids = special_ids(path, config) | ({"bos_token_id": prefix[0]} if prefix else {})
    for key in adds.keys() & ids.keys():
        adds[key](ids[key][0] if isinstance(ids[key], list) else ids[key])
    if (settings := path.with_name("tokenizer_config.json")).is_file():
        read_json(settings)  # refuses what gguf would stumble over
    if template := SpecialVocab(path.parent).chat_template:
        writer.add_chat_template(template)
    writer.add_add_bos_token(bool(prefix))
    writer.add_add_eos_token(False)


def _vocabulary(loaded: Tokenizer, described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id of the model's vocabulary; ids without a token are unused."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, number in loaded.get_vocab().items():
        tokens[number], types[number] = text, int(TokenType.NORMAL)
    for added in described.get("added_tokens", []):
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return tokens, types


def _problem(described: dict[str, Any]) -> str | None:
    model, rule = described["model"], _rule(described.get("pre_tokenizer"))
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return f"is of the kind {model.get('type')}{' with byte fallback' if model.get('byte_fallback') else ''}"
    if rule is None:
        return "splits a text into words by another rule"
    if bool(model.get("ignore_merges")) != rule.ignore_merges:
        return f"has ignore_merges {str(not rule.ignore_merges).lower()}"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"has {key}"
    normalizer = described.get("normalizer")
    if normalizer and normalizer.get("type") != "NFC":  # of nearly every text, NFC is the text itself
        return f"has the normalizer {normalizer.get('type')}"
    return None


def _rule(split: Any) -> _Rule | None:
    """The rule of a tokenizer.json's `pre_tokenizer`."""
    steps = (split.get("pretokenizers") if split.get("type") == "Sequence" else [split]) if split else []
    if [step.get("type") for step in steps] not in (["ByteLevel"], ["Split", "ByteLevel"]):
        return None
    *before, to_bytes = steps
    if to_bytes.get("add_prefix_space") or to_bytes.get("use_regex", True) == bool(before):
        return None
    if not before:
        return GPT_2
    isolated = before[0].get("behavior") == "Isolated" and not before[0].get("invert")
    return RULES.get(before[0]["pattern"].get("Regex")) if isolated else None
