"""Sampling text with the key/value cache.

Shape legend: B prompts, T length of the longest, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megamoe.model.decoder import Decoder
from megamoe.utils.errors import Problems


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set to -inf, in (B, V), all but the `top_k` largest, then all but the smallest set whose probability reaches
    `top_p` (nucleus sampling, arXiv:1904.09751). The largest always stays."""
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # probability of everything larger
        ordered = ordered.masked_fill((before >= top_p) & (before > 0), -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, order, ordered)
    return logits


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, seed: torch.Generator) -> Tensor:
    """One token id per row of `logits` (B, V): (B,). Temperature 0 takes the largest."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=seed).squeeze(1)


def generate(
    model: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    end_of_text: int | None = None,
    **options: Any,
) -> list[list[int]]:
    """Continue each prompt; returns the new token ids of each, without `end_of_text`. Arguments are those of `stream`,
    and so are errors."""
    new = list(stream(model, prompts, max_new_tokens, end_of_text=end_of_text, **options))
    rows = torch.stack(new, dim=1).tolist()
    return [row[: row.index(end_of_text)] if end_of_text in row else row for row in rows]


@torch.inference_mode()
def stream(
    model: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    end_of_text: int | None = None,
    all_done: Callable[[bool], bool] = bool,
) -> Iterator[Tensor]:
    """Continue each prompt; yields the next token id of all, (B,), one after the other. Leaves the model in eval mode.

    Args:
        prompts: token ids, at least one each; lengths may differ.
        end_of_text: a row is done at this id, and what follows in it means nothing.
        all_done: whether all are done, by whether these prompts are; ranks that share experts go on together.

    Raises UserError for a value that cannot be, and if a prompt is empty or prompt and continuation exceed
    max_position_embeddings, unless rope_scaling extends it.
    """
    Problems(sampling_problems(temperature, top_k, top_p) + _length_problems(model, prompts, max_new_tokens)).refuse()
    model.eval()
    device = model.embed_tokens.weight.device
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    real = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    cache = model.new_cache(longest + max_new_tokens)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        if all_done(bool(done.all())):
            return
        logits = model(ids, attention_mask=real, cache=cache)[:, -1]
        chosen = sample(logits, temperature, top_k, top_p, generator)
        if end_of_text is not None:
            done |= chosen == end_of_text
        yield chosen
        ids = chosen.unsqueeze(1)
        real = torch.cat((real, torch.ones_like(ids, dtype=torch.bool)), dim=1)


def sampling_problems(temperature: float, top_k: int | None, top_p: float | None) -> list[str]:
    """What keeps tokens from being drawn so, one sentence each."""
    limits = (
        ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
        ("top_k", top_k, top_k is None or top_k > 0, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
    )
    return [f"{name} is {value}; it must be {limit}." for name, value, fits, limit in limits if not fits]


def _length_problems(model: Decoder, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    if not prompts:
        return ["there is no prompt; give at least one."]
    if max_new_tokens < 1:
        return [f"max_new_tokens is {max_new_tokens}; give at least 1."]
    if not all(prompts):
        return ["a prompt has no tokens; give it some text."]
    length, limit = max(map(len, prompts)) + max_new_tokens, model.config.max_position_embeddings
    if length <= limit or model.config.rope_scaling:
        return []
    return [
        f"prompt and continuation are {length} tokens, above the model's max_position_embeddings of {limit}; "
        "shorten the prompt or lower --max_new_tokens."
    ]
