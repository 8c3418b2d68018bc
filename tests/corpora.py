"""Token files made by DeepSpeed's own builder."""

import json
from pathlib import Path

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


def write_record(prefix, tokens, size):
    """The record of a pair of so many tokens, of a text of `size` bytes."""
    shard = {"name": prefix.name, "documents": 1, "tokens": tokens, "bytes": size, "largest_id": 0}
    shard |= {"bin_sha256": "", "idx_sha256": ""}
    record = {"documents": 1, "tokens": tokens, "bytes": size, "shards": [shard]}
    Path(f"{prefix}.json").write_text(json.dumps(record))


def random_tokens(count, vocab_size, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, count)
