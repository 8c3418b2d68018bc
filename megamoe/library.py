"""megamoe from Python: the functions behind the names in `megamoe/__init__.py`.

    model, tokenizer = load_model("runs/mine"), load_tokenizer("runs/mine")
    print(generate(model, tokenizer, ["In a quiet library,"])[0])

Each takes what the tools take: a run, a checkpoint, an export, or a directory of an open model. Problems are raised as
`UserError`.

Shape legend: B samples, T positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from megamoe.checkpoint.opening import find_checkpoint, open_model, open_source, tokenizer_of
from megamoe.config.model import ModelConfig, validate
from megamoe.config.precision import find_precision
from megamoe.config.recipe import Recipe, dtype_of, parse_recipe
from megamoe.data import tokenizer as tokenizers
from megamoe.data.batches import Batch
from megamoe.evaluation.scoring import Share, bits_per_byte, score, windows_of
from megamoe.formats.config_json import find_preset
from megamoe.formats.export import write_state_dict
from megamoe.formats.plain_files import STATE_DICT_ENDINGS
from megamoe.launch.distributed import is_on_cpu, this_device
from megamoe.model import generation
from megamoe.model.decoder import Decoder
from megamoe.model.placement import placement_problems
from megamoe.training.engine import deepspeed_own_problems
from megamoe.training.step import StepResult, TrainStep, build_train_step
from megamoe.utils.errors import Problems, UserError
from megamoe.utils.json_files import read_json

# --- models ---------------------------------------------------------------------------------------------------------


def load_preset(name: str, **changes: Any) -> ModelConfig:
    """The configuration of a shipped preset, of a preset's JSON file, or of a Hugging Face directory.

    Args:
        changes: fields that are to have another value.
    """
    config = find_preset(name)
    return validate(ModelConfig, {**config.model_dump(), **changes}, name) if changes else config


def _config_of(preset: str | ModelConfig) -> ModelConfig:
    return preset if isinstance(preset, ModelConfig) else find_preset(preset)


def build_model(preset: str | ModelConfig, seed: int = 0) -> Decoder:
    """A model with initial weights, in fp32 on CPU.

    Args:
        preset: its configuration, or what `load_preset` takes.
    """
    return Decoder(_config_of(preset), seed)


def load_model(
    path: str | Path,
    preset: str | ModelConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    ema: bool = False,
) -> Decoder:
    """A model with its weights, in evaluation mode.

    Args:
        path: a run folder, a checkpoint, a Hugging Face directory, or a .pt or .safetensors file.
        preset: of such a file, which does not say what model it is of.
        ema: take the averaged weights, which the checkpoints of a run with --ema_decay hold.
    """
    config = None if preset is None else _config_of(preset)
    return open_model(Path(path), config, ema=ema).load(dtype, torch.device(device))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of what `load_model` takes, or of a tokenizer.json."""
    path = Path(path)
    is_tokenizer = path.suffix == ".json" and path.is_file()
    return tokenizers.load_tokenizer(path if is_tokenizer else tokenizer_of(path))


def save_state_dict(path: str | Path, out: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write all weights of a model, experts included, by parameter name; `torch.load(out, weights_only=True)` opens it.

    Args:
        path: what `load_model` takes; no preset is needed.
        out: a new file, .pt, .pth or .bin.
        dtype: of the weights; from a checkpoint, the fp32 masters are rounded to it. Router statistics stay fp32.
    """
    out = Path(out)
    if out.suffix not in STATE_DICT_ENDINGS:
        raise UserError(f"{out} has no ending of a state_dict, which is one file; call it {out}.pt.")
    write_state_dict(open_source(find_checkpoint(Path(path))), out, dtype)


# --- text -----------------------------------------------------------------------------------------------------------


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int = 120,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Continue each prompt in one batch; returns what is added to each, up to the end-of-text token.

    Args:
        temperature: 0 takes the most likely token each time.
        top_k: sample from that many tokens only.
        top_p: sample from the smallest set of that probability only.
    """
    _check_tokenizer(model, tokenizer)
    ids = tokenizers.encode_prompts(tokenizer, prompts)
    new = generation.generate(
        model, ids, max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, seed=seed, end_of_text=tokenizers.end_of_text_id(tokenizer),
    )  # fmt: skip
    return [tokenizers.decode_continuation(tokenizer, *pair) for pair in zip(ids, new, strict=True)]


def evaluate(
    model: Decoder, tokenizer: Tokenizer, text: str, seq_len: int | None = None, batch_size: int = 8
) -> dict[str, float]:
    """Loss on a text: "loss" in nats per token, "tokens", "bits_per_byte". Leaves the model in evaluation mode.

    The text stands behind what the tokenizer puts before it, or an end-of-text token, and is cut into windows that
    share one token, so each of its tokens is predicted once.

    Args:
        seq_len: tokens of a window; by default the model's max_position_embeddings.
        batch_size: windows per call.
    """
    _check_tokenizer(model, tokenizer)
    seq_len = model.config.max_position_embeddings if seq_len is None else seq_len
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}; give at least 1.")
    (ids,) = tokenizers.encode(tokenizer, [text])
    if not ids:
        raise UserError("the text to evaluate has no tokens; give some.")
    windows = windows_of(ids, tokenizers.start_id(tokenizer), seq_len, seq_len, owner=0)
    nats = score(model, windows, 1, Share(batch_size), model.embed_tokens.weight.device)[0, 0].item()
    return {
        "loss": nats / len(ids),
        "tokens": len(ids),
        "bits_per_byte": bits_per_byte(nats, len(text.encode())),
    }


def _check_tokenizer(model: Decoder, tokenizer: Tokenizer) -> None:
    needed, rows = tokenizers.vocabulary_of(tokenizer), model.config.vocab_size
    if needed > rows:
        raise UserError(f"the tokenizer has token id {needed - 1}, beyond the model's {rows} entries; give its own.")


# --- training -------------------------------------------------------------------------------------------------------


def build_trainer(
    preset: str | ModelConfig, ds_config: str | Path | dict[str, Any], ep_size: int = 1, seed: int = 0
) -> TrainStep:
    """Model, DeepSpeed engine and balancer on this rank, after `init_distributed`.

    Args:
        preset: the model's configuration, or what `load_preset` takes.
        ds_config: the DeepSpeed JSON, or its path; "auto" in its "bf16" section takes what rank 0 finds the faster.
        ep_size: ranks that share one set of experts.
        seed: of the initial weights.

    Raises one UserError with all problems.
    """
    if not dist.is_initialized():
        raise UserError("this rank has not joined the others yet; call megamoe.init_distributed() first.")
    config = _config_of(preset)
    ds = ds_config if isinstance(ds_config, dict) else read_json(Path(ds_config))
    where = "the DeepSpeed JSON" if isinstance(ds_config, dict) else str(ds_config)
    world_size, problems = dist.get_world_size(), Problems()
    # To find it takes a second on a CPU; a JSON without bf16 leaves nothing to choose, or to warn of.
    precision = find_precision(this_device()) if dtype_of(ds) == "bf16" else None
    choice = precision.choice if precision else "fp32"
    recipe: Recipe = problems.attempt(parse_recipe, ds, where, world_size, is_on_cpu(), choice)
    problems += placement_problems(config, ep_size, recipe.dtype if recipe else "fp32", world_size, "the model")
    if not problems:
        problems += deepspeed_own_problems(recipe)
    problems.refuse()
    if precision and dist.get_rank() == 0 and (note := precision.describe(recipe)):
        print(note, flush=True)
    return build_train_step(config, recipe, ep_size=ep_size, seed=seed)


def train_step(trainer: TrainStep, batches: Iterable[Batch]) -> StepResult:
    """One optimizer step on this rank's micro-batches, as many as the JSON accumulates. Collective.

    Args:
        batches: with labels as `Decoder.forward` takes them.
    """
    batches, needed = list(batches), trainer.engine.gradient_accumulation_steps()
    if len(batches) != needed:
        raise UserError(
            f"train_step was given {len(batches)} micro-batches, but the DeepSpeed JSON accumulates {needed} per step; "
            f"give {needed}."
        )
    trainer.model.train()  # `evaluate` and `generate` leave it otherwise
    trainer.forward_backward(batches)
    return trainer.update()
