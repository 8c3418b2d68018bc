"""Turn text into tokens: `python tools/prepare_data.py TEXT --out data/mine --vocab_size 16384`.

TEXT is a text file, a folder of them, or JSON lines (plain, .gz or .zst). With --tokenizer an existing tokenizer.json
is used, with --vocab_size one is trained on the training split first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megamoe.config import cli
from megamoe.data.corpus import input_files, read_documents, split_documents, write_corpus
from megamoe.data.tokenizer import load_tokenizer, tokenizer_file, train_tokenizer, vocabulary_of
from megamoe.utils.disk import check_absent
from megamoe.utils.errors import Problems


def parse() -> argparse.Namespace:
    """The command line, with `files`, the text's. Raises one UserError with all problems."""
    parser = cli.Parser(description="Turn text into tokens that pretrain.py reads.")
    parser.add_argument("text", type=Path, help="text file, folder, or JSON lines (.jsonl, .jsonl.gz, .jsonl.zst)")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use, or a folder that holds one")
    parser.add_argument("--end_of_text", metavar="TOKEN", help="its token that ends a document; by default its own")
    parser.add_argument("--vocab_size", type=int, help="train a tokenizer of this many entries instead")
    parser.add_argument(
        "--valid_fraction",
        type=float,
        default=0.05,
        help="share F of the text that is held out: every round(1/F)-th document",
    )
    parser.add_argument("--text_key", default="text", help="key of the text in JSON lines")
    return parser.parse(check=check)


def check(args: argparse.Namespace) -> argparse.Namespace:
    problems = Problems()
    if (args.tokenizer is None) == (args.vocab_size is None):
        problems.append("give either --tokenizer FILE or --vocab_size N.")
    elif args.end_of_text is not None and not args.tokenizer:
        problems.append("--end_of_text names a token of --tokenizer; leave it out with --vocab_size.")
    if args.valid_fraction and not 0.001 <= args.valid_fraction <= 0.5:
        problems.append(f"valid_fraction is {args.valid_fraction}; give 0, or a number from 0.001 to 0.5.")
    problems.attempt(check_absent, args.out)
    args.files = problems.attempt(input_files, args.text)
    problems.refuse()
    return args


def main() -> None:
    args = parse()
    files = args.files
    size = sum(file.stat().st_size for file in files)

    def documents(progress: Callable[[int], Any]) -> Iterator[tuple[str, str]]:
        return split_documents(read_documents(files, args.text_key, progress), args.valid_fraction)

    def bar(what: str) -> Any:
        return tqdm(total=size, desc=what, unit="B", unit_scale=True, unit_divisor=1024)

    if args.tokenizer:
        tokenizer = load_tokenizer(tokenizer_file(args.tokenizer))
    else:
        with bar("training the tokenizer") as progress:
            texts = (text for split, text in documents(progress.update) if split == "train")
            tokenizer = train_tokenizer(texts, args.vocab_size)
    with bar("tokenising") as progress:
        record = write_corpus(documents(progress.update), tokenizer, args.out, args.end_of_text)
    for name, split in record.splits.items():
        print(f"{name}: {split.documents} documents, {split.tokens} tokens, {split.bytes} bytes")
    print(f"corpus in {args.out}, vocabulary of {vocabulary_of(tokenizer)}")
