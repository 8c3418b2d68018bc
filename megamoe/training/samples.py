"""Samples while training: the model continues the user's prompts, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from megamoe.data.tokenizer import decode_continuation, encode_prompts, end_of_text_of
from megamoe.evaluation.scoring import Share
from megamoe.evaluation.shared_model import SharedModel
from megamoe.model.decoder import Decoder
from megamoe.monitoring.sink import Sample
from megamoe.utils.errors import shown

NEW_TOKENS, TEMPERATURE = 64, 0.8


@dataclass
class Sampler:
    """Continues prompts with the model that trains. What it draws follows from (seed, step) and leaves torch's random
    numbers alone, so that a run's losses are those without samples."""

    prompts: list[str]
    every: int  # steps
    seed: int
    tokenizer: Tokenizer | None  # on rank 0; the other ranks need none

    def run(
        self, model: Decoder, share: Share, device: torch.device, step: int, report: Callable[..., None]
    ) -> list[Sample]:
        """On rank 0 what `megamoe generate --seed (seed + step)` makes of each prompt, nothing elsewhere. Collective;
        leaves the model in evaluation mode.

        Args:
            report: is told where this rank is, as `Position.at` is.
        """
        shared = SharedModel(model, share, device, report)
        if self.tokenizer is None:
            shared.follow()
            return []
        shared.work_on("sampling")
        ids, end = encode_prompts(self.tokenizer, self.prompts), end_of_text_of(self.tokenizer)
        end_of_text = self.tokenizer.token_to_id(end) if end else None
        options = {"temperature": TEMPERATURE, "seed": self.seed + step, "end_of_text": end_of_text}
        room = model.config.max_position_embeddings - max(map(len, ids))
        rows = shared.generate(ids, min(NEW_TOKENS, room), options)
        shared.release()
        added = [decode_continuation(self.tokenizer, *one) for one in zip(ids, rows, strict=True)]
        return [Sample(*one) for one in zip(self.prompts, added, strict=True)]


def prompt_problems(prompts: list[str], tokenizer: Tokenizer, max_length: int) -> list[str]:
    """What keeps prompts from being continued by a model that reads so many tokens. Raises UserError."""
    lengths = [len(ids) for ids in encode_prompts(tokenizer, prompts)]
    return [
        f"sample_prompts: {shown(prompt)} has {length} tokens; give 1 to {max_length - 1}, so that one more fits into "
        f"the model's max_position_embeddings of {max_length}."
        for prompt, length in zip(prompts, lengths, strict=True)
        if not 0 < length < max_length
    ]
