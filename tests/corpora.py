"""Token files made by DeepSpeed's own builder."""

import numpy as np
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDatasetBuilder

HEADER = 9 + 8 + 1 + 8 + 8


def build(prefix, tokens, dtype=np.int32, item=7):
    """Write `tokens` with DeepSpeed's builder, in items of `item` tokens, a document each."""
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for start in range(0, len(tokens), item):
        builder.add_item_numpy(np.asarray(tokens[start : start + item]))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def random_tokens(count, vocab_size, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, count)
