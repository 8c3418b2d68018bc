"""Evaluation on the held-out sets of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megamoe.config.model import ModelConfig
from megamoe.data.token_files import TokenCorpus
from megamoe.data.tokenizer import load_tokenizer
from megamoe.evaluation.scoring import Share, Window, bits_per_byte, score
from megamoe.model.decoder import Decoder

DECODED = 256  # samples decoded at a time; a character may be torn where one ends


def tokens_per_byte(corpus: TokenCorpus, limit: int) -> float | None:
    """Tokens of held-out text over its bytes: those that megamoe prepare has counted, else those that the
    tokenizer beside the corpus decodes its first `limit` samples to; None where there is neither. Raises UserError."""
    if corpus.record and corpus.record.bytes:
        return corpus.record.tokens / corpus.record.bytes
    file = corpus.prefix.parent / "tokenizer.json"
    if not file.exists():
        return None
    tokenizer = load_tokenizer(file, corpus.vocab_size)
    limit = min(limit, corpus.num_samples)
    size = 0
    for start in range(0, limit, DECODED):
        labels = [corpus.sample(index).labels for index in range(start, min(start + DECODED, limit))]
        size += len(tokenizer.decode(np.concatenate(labels).tolist()).encode())
    return limit * corpus.seq_len / size if size else None


class HeldOut(NamedTuple):
    """A held-out set of a run."""

    name: str
    corpus: TokenCorpus
    tokens_per_byte: float | None  # of its text; None where the bytes are not known


@dataclass
class Evaluator:
    """Mean loss on the samples of each held-out set."""

    sets: list[HeldOut]
    limit: int  # most samples to use of each

    def run(self, model: Decoder, share: Share, device: torch.device) -> dict[str, float]:
        """Values by name: of the first set, loss in nats, tokens and, where it is known, bits_per_byte; of the others,
        NAME_loss and NAME_bits_per_byte. Collective; leaves the model in evaluation mode."""
        sums = score(model, self._windows(model.config), len(self.sets), share, device).tolist()
        values: dict[str, float] = {}
        for number, (held_out, (nats, tokens, _)) in enumerate(zip(self.sets, sums, strict=True)):
            prefix = f"{held_out.name}_" if number else ""
            values[f"{prefix}loss"] = nats / tokens
            if not number:
                values["tokens"] = int(tokens)
            if held_out.tokens_per_byte is not None:
                values[f"{prefix}bits_per_byte"] = bits_per_byte(nats, tokens / held_out.tokens_per_byte)
        return values

    def _windows(self, config: ModelConfig) -> Iterator[Window]:
        for number, held_out in enumerate(self.sets):
            for index in range(min(self.limit, held_out.corpus.num_samples)):
                sample = held_out.corpus.sample(index)
                starts = sample.starts if config.document_attention else sample.starts[:0]
                yield Window(sample.ids, sample.labels, number, starts)
