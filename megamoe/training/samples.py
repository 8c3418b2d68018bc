"""Samples while training: what the model makes of the user's prompts, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from megamoe.data.tokenizer import decode_continuation, encode_prompts, end_of_text_of
from megamoe.evaluation.scoring import Share
from megamoe.evaluation.shared_model import SharedModel
from megamoe.model.decoder import Decoder
from megamoe.monitoring.sink import Sample
from megamoe.utils.errors import Problems, shown

NEW_TOKENS, TEMPERATURE = 64, 0.8


class Prompts(NamedTuple):
    """Texts that samples continue."""

    texts: list[str]
    ids: list[list[int]]  # of each
    tokenizer: Tokenizer
    new_tokens: int


def encode_for_sampling(tokenizer: Tokenizer, texts: list[str], max_length: int) -> Prompts:
    """Prompts with their tokens. Raises UserError for those that leave no room for a token, or have none.

    Args:
        max_length: most tokens that the model reads.
    """
    ids = encode_prompts(tokenizer, texts)
    problems = Problems(
        f"sample_prompts: {shown(text)} has {len(one)} tokens; give 1 to {max_length - 1}, so that one can follow "
        f"within the model's max_position_embeddings of {max_length}."
        for text, one in zip(texts, ids, strict=True)
        if not 0 < len(one) < max_length
    )
    problems.refuse()
    return Prompts(texts, ids, tokenizer, min(NEW_TOKENS, max_length - max(map(len, ids))))


@dataclass
class Sampler:
    """Continues prompts with the model that trains. The draws of a step follow from (seed, step), and touch no other
    random numbers, so that a run's losses are those without samples."""

    prompts: Prompts | None  # on rank 0; the other ranks need none
    seed: int
    report: Callable[..., None] = lambda *_, **__: None  # is told where this rank is, as `Position.at` is

    def run(self, model: Decoder, share: Share, device: torch.device, step: int) -> list[Sample]:
        """A sample of each prompt on rank 0, none elsewhere: that of `megamoe generate --seed (seed + step)`.
        Collective; leaves the model in evaluation mode."""
        shared = SharedModel(model, share, device, self.report)
        if self.prompts is None:
            shared.follow()
            return []
        texts, ids, tokenizer, new_tokens = self.prompts
        shared.work_on("sampling")
        end_of_text = end_of_text_of(tokenizer)
        options = {"temperature": TEMPERATURE, "seed": self.seed + step}
        end_id = end_of_text and tokenizer.token_to_id(end_of_text)
        rows = shared.generate(ids, new_tokens, {**options, "end_of_text": end_id})
        shared.release()
        added = (decode_continuation(tokenizer, *one) for one in zip(ids, rows, strict=True))
        return [Sample(*one) for one in zip(texts, added, strict=True)]
