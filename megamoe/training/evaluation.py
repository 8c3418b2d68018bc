"""Evaluation on held-out samples."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist

from megamoe.data.batches import NO_LABEL, eval_batch
from megamoe.data.token_files import TokenCorpus, split_counts
from megamoe.data.tokenizer import load_tokenizer

DECODED = 256  # samples decoded at a time; a character may be torn where one ends


def tokens_per_byte(corpus: TokenCorpus, limit: int) -> float | None:
    """Tokens of held-out text over its bytes: those that tools/prepare_data.py has counted, else those that the
    tokenizer beside the corpus decodes its first `limit` samples to; None where there is neither. Raises UserError."""
    counts = split_counts(corpus.prefix)
    if counts:
        return counts["tokens"] / counts["bytes"]
    file = corpus.prefix.parent / "tokenizer.json"
    if not file.exists():
        return None
    tokenizer = load_tokenizer(file, corpus.vocab_size)
    limit = min(limit, corpus.num_samples)
    size = 0
    for start in range(0, limit, DECODED):
        labels = [corpus.sample(index)[1:] for index in range(start, min(start + DECODED, limit))]
        size += len(tokenizer.decode(np.concatenate(labels).tolist()).encode())
    return limit * corpus.seq_len / size if size else None


class Evaluator:
    """Mean loss on the held-out samples."""

    def __init__(self, corpus: TokenCorpus, limit: int, tokens_per_byte: float | None):
        """
        Args:
            limit: most samples to use.
            tokens_per_byte: of the held-out text; None where the bytes are not known.
        """
        self.corpus = corpus
        self.limit = min(limit, corpus.num_samples)
        self.tokens_per_byte = tokens_per_byte

    @torch.no_grad()
    def run(self, model: torch.nn.Module, micro_batch: int, rank: int, world_size: int, device: torch.device) -> dict:
        """Collective; every rank runs equally many forward passes. Returns loss in nats, tokens, bits_per_byte."""
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
        for start in range(0, self.limit, micro_batch * world_size):
            batch = eval_batch(self.corpus, start + rank * micro_batch, micro_batch, self.limit)
            batch = batch.to(device)
            counted = (batch.labels != NO_LABEL).sum()
            total += torch.stack((model(batch.input_ids, batch.labels).double() * counted, counted.double()))
        model.train()
        dist.all_reduce(total)
        nats, tokens = total.tolist()
        result = {"loss": nats / tokens, "tokens": int(tokens)}
        if self.tokens_per_byte is not None:
            result["bits_per_byte"] = nats / tokens / math.log(2) * self.tokens_per_byte
        return result
