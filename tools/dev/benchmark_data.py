"""What surrounds the training step: tokenising, reading samples, and starting.

    python tools/dev/benchmark_data.py data/plays data/plays-1024       text and the corpus made of it

Prints bytes per second of tokenising with the corpus' tokenizer, by `tokenizers` and `fastokens`; the time to read one
sample; the time that a rank of a small or a large run takes for a step's batch, for one corpus and for a mix; the time
of best-fit packing; and the seconds from the launch of a run to its first step, with everything compiled already.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megamoe.config import cli
from megamoe.config.model import load_preset
from megamoe.config.phases import PhaseSettings, make_phases
from megamoe.config.run import Corpus
from megamoe.data.batches import TrainData
from megamoe.data.encoder import Encoder
from megamoe.data.index_file import write_index
from megamoe.data.inputs import input_files
from megamoe.data.packing import PackedCorpus
from megamoe.data.selection import read_documents
from megamoe.data.token_files import TokenCorpus, corpus_prefix
from megamoe.data.tokenizer import load_tokenizer
from megamoe.utils.errors import UserError

ROOT = Path(__file__).parents[2]
ENOUGH = 20_000_000  # bytes of text at most
SLICE = 1_000_000  # bytes of it that are encoded at a time


def tokenising(text: Path, file: Path) -> Iterator[str]:
    """Compares `tokenizers` with `fastokens`, one thread each, in turns on slices of the text."""
    texts = read_documents(input_files(text), "text")
    encoders = {"tokenizers": Encoder(load_tokenizer(file)), "fastokens": Encoder(load_tokenizer(file), is_fast=True)}
    rates: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(ENOUGH // SLICE):
        part, size = [], 0
        while size < SLICE and (document := next(texts, None)):
            part.append(document)
            size += len(document.encode())
        for name, encode in encoders.items() if part else ():
            start = time.perf_counter()
            encode(part)
            rates[name].append(size / (time.perf_counter() - start))
    for name, found in rates.items():
        ratio = statistics.median(one / other for one, other in zip(found, rates["tokenizers"], strict=True))
        yield f"{name}, one thread: {statistics.median(found) / 1e6:.1f} MB/s, {ratio:.1f} x tokenizers"


def open_data(corpus: str, seq_len: int, corpora: int = 1, ranks: int = 1) -> TrainData:
    """The corpus as training reads it, once or as a mix of several, in steps of two samples per rank."""
    config = load_preset("moe-680m")
    opened = TokenCorpus(corpus_prefix(corpus, "train"), seq_len, config.vocab_size)
    mix = [Corpus(path=str(number), weight=1.0 + number) for number in range(corpora)]
    phases = make_phases(
        [PhaseSettings()], data=mix, seq_len=seq_len, micro_batch=2, samples=2 * ranks, world_size=ranks
    )
    return TrainData(phases, {(one.path, seq_len): opened for one in mix}, seed=1)


def seconds_per_sample(corpus: str, seq_len: int, samples: int = 2000) -> float:
    """Seconds to read one sample of `seq_len` tokens, at its place in the order."""
    data = open_data(corpus, seq_len)
    start = time.perf_counter()
    for step in range(1, samples // 2 + 1):
        for _ in data.step_batches(step, 0):
            pass
    return (time.perf_counter() - start) / samples


def seconds_per_step(data: TrainData, ranks: int, steps: int = 1000) -> float:
    """Seconds of one rank to find and read a step's two samples, one step after the other."""
    rank = ranks // 2
    start = time.perf_counter()
    for step in range(1, steps + 1):
        for _ in data.step_batches(step, rank):
            pass
    return (time.perf_counter() - start) / steps


def seconds_to_pack(documents: int, seq_len: int = 2048) -> float:
    """Seconds of one core to pack made-up documents, of 490 tokens in the median."""
    lengths = np.random.default_rng(0).lognormal(6.2, 1.1, documents).astype(int).clip(2, 200_000)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "train"
        write_index(prefix.with_suffix(".idx"), np.uint16, lengths)
        with open(prefix.with_suffix(".bin"), "wb") as file:
            file.truncate(2 * int(lengths.sum()))
        corpus = TokenCorpus(prefix, seq_len, 1 << 16, scan=False)
        start = time.process_time()
        PackedCorpus(corpus, writes=True)
        return time.process_time() - start


def seconds_to_first_step(corpus: str, ranks: int) -> float:
    """Seconds from launching a run of the tiny preset until it logs its first step."""
    with tempfile.TemporaryDirectory() as folder:
        script, ds_config = ROOT / "launch_scripts/single_node.sh", ROOT / "ds_configs/tiny.json"
        words = [script, ranks, "--ds_config", ds_config, "--preset", "tiny", "--ep_size", ranks, "--data", corpus,
                 "--steps", 1, "--log_interval", 1, "--run_dir", Path(folder) / "run"]  # fmt: skip
        start = time.perf_counter()
        run = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert run.stdout
        lines = []
        for line in run.stdout:
            lines.append(line)
            if line.startswith("step=1 "):
                seconds = time.perf_counter() - start
                run.communicate()
                return seconds
        raise UserError(
            f"the run ended with code {run.wait()} before its first step; its output: {''.join(lines[-20:])}"
        )


def check(args: argparse.Namespace) -> argparse.Namespace:
    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds}; give at least 1.")
    return args


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Time tokenising, reading samples, and starting a run.",
    )
    parser.add_argument("text", type=Path, help="text, as prepare_data.py takes it")
    parser.add_argument("corpus", help="folder that prepare_data.py has made of it")
    parser.add_argument("--rounds", type=int, default=3, help="starts that are timed, on 1 and on 2 ranks in turns")
    args = check(parser.parse_args())
    tokenizer = Path(args.corpus) / "tokenizer.json"
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    for line in tokenising(args.text, tokenizer):
        print(line, flush=True)
    for seq_len in (256, 1024):
        print(
            f"reading a sample of {seq_len} tokens: {seconds_per_sample(args.corpus, seq_len) * 1e3:.3f} ms", flush=True
        )
    for corpora in (1, 5):
        for ranks in (1, 8, 1024):
            milliseconds = seconds_per_step(open_data(args.corpus, 1024, corpora, ranks), ranks) * 1e3
            print(f"corpora: {corpora}, ranks: {ranks}: a step of 2 samples of 1024 tokens: {milliseconds:.3f} ms",
                  flush=True)  # fmt: skip
    for documents in (10**6, 10**7):
        print(f"packing {documents:,} documents: {seconds_to_pack(documents):.1f} s of one core", flush=True)
    starts = [[seconds_to_first_step(args.corpus, ranks) for ranks in (1, 2)] for _ in range(args.rounds)]
    for ranks, times in zip((1, 2), zip(*starts, strict=True), strict=True):
        print(f"from launch to the first step, {ranks} rank(s): {statistics.median(times):.1f} s, measured "
              f"{', '.join(f'{seconds:.1f}' for seconds in times)}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
