"""Token files made by DeepSpeed's own builder, and prepared folders."""

import json
from pathlib import Path

import numpy as np
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDatasetBuilder

from megamoe.commands.check import read_shard
from megamoe.config.phases import PhaseSettings, make_phases
from megamoe.config.run import Corpus
from megamoe.data.batches import TrainData
from megamoe.data.corpus_record import CorpusRecord, split_of, write_corpus_record
from megamoe.data.encoder import Encoder
from megamoe.data.index_file import token_dtype, write_index
from megamoe.data.selection import SPLITS
from megamoe.data.shard_writer import BLOCK, ShardWriter, block_hash
from megamoe.data.tokenizer import end_of_text_id

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
    end, encode = end_of_text_id(tokenizer, end_of_text), Encoder(tokenizer)
    writers = {split: ShardWriter(folder / f"{split}-00000", encode, end) for split in SPLITS}
    for split, document in documents:
        writers[split].add(document)
    shards = {split: [shard] for split, writer in writers.items() if (shard := writer.close())}
    return write_corpus_record(folder, tokenizer, end, shards)


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


def prepared(folder, splits, vocab_size=300, end_opens_next=False):
    """A prepared folder; each shard of a split is a list of documents. Returns the prefix of its training split."""
    folder.mkdir()
    record = {}
    for split, shards in splits.items():
        records = []
        for number, documents in enumerate(shards):
            prefix, dtype = folder / f"{split}-{number:05}", token_dtype(vocab_size)
            write_index(Path(f"{prefix}.idx"), dtype, [len(document) for document in documents])
            data = np.concatenate(documents).astype(dtype).tobytes()
            Path(f"{prefix}.bin").write_bytes(data)
            sums = b"".join(block_hash(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK))
            Path(f"{prefix}.sums").write_bytes(sums)
            records.append(read_shard(prefix).model_copy(update={"bytes": 3 * sum(map(len, documents))}))
        record[split] = split_of(records, end_opens_next)
    (folder / "corpus.json").write_text(CorpusRecord(splits=record).model_dump_json())
    return folder / "train"
