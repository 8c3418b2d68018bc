"""Token files made by DeepSpeed's own builder, and prepared folders."""

import json
from pathlib import Path

import numpy as np
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDatasetBuilder

from megamoe.config.phases import PhaseSettings, make_phases
from megamoe.config.run import Corpus
from megamoe.data.batches import TrainData
from megamoe.data.corpus import complete, write_shards
from megamoe.data.corpus_record import CorpusRecord, split_of
from megamoe.data.encoder import Encoder
from megamoe.data.index_file import token_dtype
from megamoe.data.shard_writer import ShardWriter
from megamoe.data.tokenizer import end_of_text_id, vocabulary_of

HEADER = 9 + 8 + 1 + 8 + 8


def build(prefix, tokens, dtype=np.int32, item=7):
    """Write `tokens` with DeepSpeed's builder, in items of `item` tokens, a document each."""
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for start in range(0, len(tokens), item):
        builder.add_item_numpy(np.asarray(tokens[start : start + item]))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_corpus(documents, tokenizer, folder, end_of_text=None):
    """A prepared folder of ("train" or "valid", text) pairs; returns its record."""
    folder.mkdir()
    end, dtype = end_of_text_id(tokenizer, end_of_text), token_dtype(vocabulary_of(tokenizer))
    writers = write_shards(documents, Encoder(tokenizer), end, dtype, folder / "one")
    shards = {split: [shard] for split, writer in writers.items() if (shard := writer.close())}
    for split, (shard,) in shards.items():
        for suffix in (".bin", ".idx"):
            (folder / f"{shard.name}{suffix}").rename(folder / f"{split}-00000{suffix}")
        shards[split] = [shard.model_copy(update={"name": f"{split}-00000"})]
    return complete(folder, tokenizer, end, shards)


def write_record(prefix, tokens, size):
    """The record of a pair of so many tokens, of a text of `size` bytes."""
    shard = {"name": prefix.name, "documents": 1, "tokens": tokens, "bytes": size, "largest_id": 0}
    shard |= {"bin_sha256": "", "idx_sha256": ""}
    record = {"documents": 1, "tokens": tokens, "bytes": size, "shards": [shard]}
    Path(f"{prefix}.json").write_text(json.dumps(record))


def train_data(sources, weights, samples, seed=12, micro_batch=None, world_size=1, given=(), **options):
    """A run on these sources; `given` are its phases, by default one; `options` of `TrainData`."""
    mix = [Corpus(path=str(number), weight=weight) for number, weight in enumerate(weights)]
    phases = make_phases(
        [PhaseSettings(**one) for one in given] or [PhaseSettings()],
        data=mix, seq_len=sources[0].seq_len, micro_batch=micro_batch or samples // world_size, samples=samples,
        world_size=world_size,
    )  # fmt: skip
    # Those that have no weight are the same ones in other lengths.
    opened = {(str(number % len(weights)), one.seq_len): one for number, one in enumerate(sources)}
    return TrainData(phases, opened, seed, **options)


def random_tokens(count, vocab_size, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def prepared(folder, splits, vocab_size=300):
    """A prepared folder; each shard of a split is a list of documents. Returns the prefix of its training split."""
    folder.mkdir()
    record = {}
    for split, shards in splits.items():
        records = []
        for number, documents in enumerate(shards):
            writer = ShardWriter(folder / f"{split}-{number:05}", token_dtype(vocab_size))
            for document in documents:
                writer.add(document, 3 * len(document))
            records.append(writer.close())
        record[split] = split_of(records)
    (folder / "corpus.json").write_text(CorpusRecord(splits=record).model_dump_json())
    return folder / "train"
