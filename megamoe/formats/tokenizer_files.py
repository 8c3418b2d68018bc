"""The tokenizer of a Hugging Face directory: its files, and the ids of its special tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megamoe.config.model import ModelConfig
from megamoe.data.tokenizer import end_of_text_of, known_token, load_tokenizer, prefix_of
from megamoe.utils.json_files import read_json, write_json
from megamoe.utils.run_folder import TOKENIZER_FILES

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def special_ids(tokenizer: Path, config: ModelConfig) -> dict[str, Any]:
    """Ids by the keys of TOKEN_IDS, of the tokenizer.json at `tokenizer`: those that the files next to it give,
    or else the end-of-text token for all but what stands before a text. Raises UserError where the tokenizer does not
    fit the model. A directory with a config.json may have its tokenizer in another file."""
    path = tokenizer.with_name("config.json")
    is_elsewhere = path.is_file() and not tokenizer.is_file()
    loaded = None if is_elsewhere else load_tokenizer(tokenizer, config.vocab_size)
    files = (tokenizer.with_name(f"{name}.json") for name in ("tokenizer_config", "generation_config", "config"))
    settings, *given = (read_json(file) if file.is_file() else {} for file in files)
    found = {key: values[key] for values in given for key in TOKEN_IDS if _is_id(values.get(key))}
    if not loaded:
        return found
    named = {key: known_token(settings.get(key.removesuffix("_id")), loaded) for key in TOKEN_IDS}
    found = {key: loaded.token_to_id(name) for key, name in named.items() if name} | found
    end_of_text = end_of_text_of(loaded)
    own = {} if end_of_text is None else {"eos_token_id": loaded.token_to_id(end_of_text)}
    own |= {"bos_token_id": prefix[0]} if (prefix := prefix_of(loaded)) else {}
    return own | found if found or end_of_text is None else dict.fromkeys(TOKEN_IDS, own["eos_token_id"]) | own


def _is_id(value: Any) -> bool:
    """There may be several that end a text."""
    return isinstance(value, int) or (isinstance(value, list) and all(isinstance(one, int) for one in value))


def write_tokenizer(folder: Path, tokenizer: Path, config: ModelConfig) -> dict[str, Any]:
    """Write a tokenizer.json and what transformers needs with it: of a Hugging Face directory, its own files. Returns
    `special_ids`."""
    ids = special_ids(tokenizer, config)
    for name in TOKENIZER_FILES:
        if tokenizer.with_name(name).is_file():
            shutil.copyfile(tokenizer.with_name(name), folder / name)
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    if (folder / "tokenizer_config.json").exists() or not tokenizer.is_file():
        return ids
    loaded = load_tokenizer(tokenizer)
    names = {key.removesuffix("_id"): known_token(one, loaded) for key, one in ids.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings | names)
    return ids


def write_generation_config(folder: Path, ids: dict[str, Any]) -> None:
    """The special tokens for transformers' `generate`, unless the tokenizer's directory has said how to generate."""
    if not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
