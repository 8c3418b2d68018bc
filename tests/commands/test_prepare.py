"""A corpus from units: the same bytes whatever the processes and after any kill."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from refusals import has, only, refusals
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from megamoe.commands import prepare as command
from megamoe.data import inputs, preparation
from megamoe.data.corpus_record import read_record
from megamoe.data.token_files import TokenCorpus
from megamoe.data.tokenizer import load_tokenizer, train_tokenizer

PROGRAM = """
if __name__ == "__main__":
    from megamoe.__main__ import main
    from megamoe.data import inputs

    inputs.UNIT = 2000
    main("prepare")
"""


def documents(seed, count=300):
    draw = random.Random(seed)
    words = [draw.randbytes(draw.randrange(1, 5)).hex().replace("0", "é") for _ in range(200)]
    return [" ".join(draw.choices(words, k=draw.randrange(1, 120))) + "\n" for _ in range(count)]


@pytest.fixture
def texts(tmp_path):
    """Two sources: JSON lines with a score, and a folder of text."""
    lines = [json.dumps({"text": text, "score": number % 4}) for number, text in enumerate(documents(1))]
    (tmp_path / "web.jsonl").write_text("\n".join(lines))
    (tmp_path / "books").mkdir()
    for number, text in enumerate(documents(2, 60)):
        (tmp_path / "books" / f"{number:02}.txt").write_text(text)
    train_tokenizer(documents(3), 400).save(str(tmp_path / "tokenizer.json"))
    return [f"web={tmp_path / 'web.jsonl'}", f"books={tmp_path / 'books'}", "--tokenizer", tmp_path / "tokenizer.json"]


@pytest.fixture
def prepare(run, monkeypatch):
    """What a call with small units prints."""
    monkeypatch.setattr(inputs, "UNIT", 4500)

    def prepare(*words):
        code, out, problems = run("prepare", *words)
        assert code == 0, problems
        return out

    return prepare


@pytest.fixture
def refused(call, monkeypatch):
    """The problems that a call with small units ends with."""
    monkeypatch.setattr(inputs, "UNIT", 4500)
    return partial(refusals, call, "prepare")


def content(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def texts_of(folder, split):
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    corpus = TokenCorpus(folder / split, 1, 400)
    return [tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) for ids in corpus.documents()]


def number_of_units(texts):
    sources = {name: inputs.input_files(Path(path)) for name, path in (word.split("=") for word in texts[:2])}
    return len(inputs.units_of(sources, ["text"]))


def test_any_number_of_processes_gives_the_same_bytes_and_every_document_once(tmp_path, texts, prepare, refused):
    (tmp_path / "books/00a.txt").write_text(documents(1)[0])
    options = ("--valid_fraction", 0.5, "--drop_duplicates")
    for processes in (1, 3):
        said = prepare(*texts, *options, "--processes", processes, "--out", tmp_path / f"{processes}")
    assert content(tmp_path / "1") == content(tmp_path / "3")
    splits, units = read_record(tmp_path / "1").splits, number_of_units(texts)
    for name, split in splits.items():
        assert len(split.shards) == units
        has(said, f"{name}: {split.documents} documents, {split.tokens} tokens, {split.bytes} bytes")
    shards = [f"{name}-{n:05}{end}" for name in splits for n in range(units) for end in (".bin", ".idx", ".sums")]
    assert sorted(content(tmp_path / "1")) == sorted([*shards, "corpus.json", "tokenizer.json"])
    found = [text for split in ("train", "valid") for text in texts_of(tmp_path / "1", split)]
    assert sorted(found) == sorted([*documents(1), *documents(2, 60)])
    before = content(tmp_path / "1")
    has(only(refused(*texts, *options, "--out", tmp_path / "1")), str(tmp_path / "1"), "exists already")
    assert content(tmp_path / "1") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "books", "tokenizer.json", "web.jsonl"]


def test_a_glob_that_the_shell_expands_gives_what_a_quoted_one_gives(tmp_path, texts, prepare):
    words = sorted((tmp_path / "books").glob("*.txt")), [tmp_path / "books" / "*.txt"]
    for number, some in enumerate(words):
        prepare(*some, *texts[2:], "--processes", 1, "--out", tmp_path / f"{number}")
    assert content(tmp_path / "0") == content(tmp_path / "1")


def test_the_tokenizer_is_trained_on_the_training_split_only(tmp_path, prepare):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text * 100}) + "\n" for text in ("abab", "qzqz")))
    prepare(tmp_path / "text.jsonl", "--out", tmp_path / "out", "--vocab_size", 270, "--valid_fraction", 0.5)
    vocabulary = load_tokenizer(tmp_path / "out" / "tokenizer.json").get_vocab()
    assert "ab" in vocabulary
    assert "qz" not in vocabulary


def test_a_tokenizer_may_be_given_by_its_folder_and_its_end_of_text_be_named(tmp_path, texts, prepare, refused):
    names = ["[UNK]", "</s>", "<stop>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.save(str(tmp_path / "tokenizer.json"))
    call = (tmp_path / "books", "--tokenizer", tmp_path, "--valid_fraction", 0, "--processes", 1)
    has(only(refused(*call, "--out", tmp_path / "no", "--end_of_text", "<halt>")), '"<halt>"', "name one")
    for name, more, end in (("one", (), 1), ("two", ("--end_of_text", "<stop>"), 2), ("declared", (), 2)):
        if name == "declared":
            (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
        prepare(*call, *more, "--out", tmp_path / name)
        ends = [ids[-1] for ids in TokenCorpus(tmp_path / name / "train", 1, 400).documents()]
        tokens = np.concatenate(list(TokenCorpus(tmp_path / name / "train", 1, 400).documents()))
        assert ends == [end] * 60
        assert np.isin(tokens, (1, 2)).sum() == 60


def test_a_wrong_call_is_refused_with_one_line_and_leaves_nothing(tmp_path, texts, refused):
    (tmp_path / "bad").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    for name in ("b", "body"):
        pyarrow.parquet.write_table(pyarrow.table({name: ["x"]}), tmp_path / f"{name}.parquet")
    books, out, none = tmp_path / "books", ("--out", tmp_path / "out"), tmp_path / "none"
    trained = (*out, "--vocab_size", 300)
    before = sorted(tmp_path.iterdir())
    for words, *parts in [
        ((books, *out), "--tokenizer", "--vocab_size"),
        ((books, *trained, "--tokenizer", none), "--tokenizer", "--vocab_size"),
        ((books, *out, "--tokenizer", none), str(none), "does not exist"),
        ((books, *out, "--vocab_size", 256), "256", "257"),
        ((books, *trained, "--where", "score"), '"score" is no condition', "give KEY=VALUE"),
        ((books, *trained, "--min_chars", 5000), "the corpus is empty", "short: 60", "give"),
        ((none, *trained), str(none), "does not exist"),
        ((tmp_path / "bad", *trained), str(tmp_path / "bad"), "0xe9", "offset 3"),
        ((tmp_path / "empty.txt", *trained), "empty", "give"),
        ((books, *trained, "--end_of_text", "</s>"), "--end_of_text", "--tokenizer"),
        (("/dev/zero", *trained), "/dev/zero", "not a regular file"),
        ((books, "--vocab_size", 300), "out"),
        ((books, "--out", books / "00.txt" / "out", "--vocab_size", 300), str(books / "00.txt")),
    ]:
        has(only(refused(*words)), *parts)
        assert sorted(tmp_path.iterdir()) == before
    for problem, part in zip(refused(none, "--out", tmp_path), ("give either", "exists", "not exist"), strict=True):
        has(problem, part)
    for problem, name in zip(refused(tmp_path / "b*.parquet", *trained), ("b", "body"), strict=True):
        has(problem, f"{name}.parquet", "no column text", "--text_key")


def test_a_corpus_is_byte_equal_after_kills_at_random_moments(tmp_path, texts, prepare, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    call = [sys.executable, tmp_path / "program.py", *texts, "--out", tmp_path / "killed", "--processes", 2]
    work = tmp_path / ".killed.partial"
    draw, finished = random.Random(5), [0]
    while len(finished) < 5:
        process = subprocess.Popen(
            list(map(str, call)), env=environment, start_new_session=True, stdout=-3, stderr=subprocess.PIPE
        )
        goal = finished[-1] + draw.randrange(1, 4)
        while len(list(work.glob("*-record.json"))) < goal:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
        # All but multiprocessing's resource_tracker, which takes the semaphores in /dev/shm away.
        found = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
        for one in [one for one in found if not any("resource_tracker" in word for word in one.cmdline())]:
            one.kill()
        process.communicate()
        finished.append(len(list(work.glob("*-record.json"))))
    assert not (tmp_path / "killed").exists()
    assert all(before < after for before, after in itertools.pairwise(finished))  # what was finished is kept
    monkeypatch.setattr(inputs, "UNIT", 2000)
    for out in ("killed", "whole"):
        prepare(*texts, "--out", tmp_path / out, "--processes", 1)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_an_unfinished_corpus_refuses_other_settings_and_other_input(tmp_path, texts, prepare, refused, monkeypatch):
    monkeypatch.setattr(command, "SAMPLE", 100)  # so that the bad document is met after others
    bad = tmp_path / "books/99.txt"
    bad.write_bytes(b"caf\xe9")
    call = (*texts, "--out", tmp_path / "out", "--processes", 1)
    has(only(refused(*call)), str(bad), "0xe9")
    for change, what, *words in (
        (lambda: None, "min_chars, valid_fraction", "--min_chars", 9, "--valid_fraction", 0.5),
        (lambda: bad.write_text("fixed"), "input"),
        (lambda: monkeypatch.setattr(command, "__version__", "9"), "input, version"),
    ):
        change()
        has(only(refused(*call, *words)), str(tmp_path / ".out.partial"), f"another {what};", "remove that folder")
    shutil.rmtree(tmp_path / ".out.partial")
    prepare(*call)


def test_what_is_finished_stays_on_a_full_disk_and_the_error_names_the_output(tmp_path, texts, prepare, refused):
    call = (*texts, "--out", tmp_path / "out", "--processes", 1)
    no_room = patch.object(preparation, "write_corpus_record", side_effect=OSError(28, "No space left on device"))
    with no_room, pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/out'"):
        refused(*call)
    units = number_of_units(texts)
    has(prepare(*call), f"{units} of {units} units are finished already")


def test_only_what_the_options_select_is_taken_and_all_else_is_counted(tmp_path, texts, prepare):
    (tmp_path / "books/98.txt").write_text(documents(1)[0])
    (tmp_path / "books/99.txt").write_text("\n")
    options = ("--where", "score!=1", "score<3", "--min_chars", 100, "--max_chars", 600, "--valid_fraction", 0)
    out = tmp_path / "out"
    said = prepare(*texts, *options, "--drop_duplicates", "--processes", 1, "--out", out)
    record = read_record(out)
    web = [text for number, text in enumerate(documents(1)) if number % 4 in (0, 2)]
    taken = []
    for source, some, more in zip(
        record.sources, (web, documents(2, 60)), ({"where": 150}, {"empty": 1, "duplicate": 1}), strict=True
    ):
        own = [text for text in some if 100 <= len(text) <= 600]
        short, long = sum(len(text) < 100 for text in some), sum(len(text) > 600 for text in some)
        assert source.dropped == {"short": short, "long": long, **more}
        assert (source.documents, source.bytes) == (len(own), sum(len(text.encode()) for text in own))
        has(said, f"{source.name}: {len(own)} documents, {source.tokens} tokens", f"{short} dropped (short)")
        taken += own
    assert texts_of(out, "train") == taken
    lengths = np.array([len(ids) for ids in TokenCorpus(out / "train", 1, 400).documents()])
    powers, counts = np.unique(2 ** np.floor(np.log2(lengths)).astype(int), return_counts=True)
    assert record.lengths == dict(zip(map(str, powers), counts.tolist(), strict=True))
    assert sum(source.tokens for source in record.sources) == record.splits["train"].tokens == lengths.sum()


def test_a_dry_run_shows_documents_with_their_tokens_and_writes_nothing(tmp_path, texts, prepare):
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    (name,) = tokenizer.get_added_tokens_decoder().values()
    tokenizer.post_processor = TemplateProcessing(f"{name} $0", special_tokens=[(str(name), 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    before = sorted(tmp_path.rglob("*"))
    said = prepare(*texts, "--out", tmp_path / "out", "--dry_run")
    assert sorted(tmp_path.rglob("*")) == before
    ids = tokenizer.encode(documents(1)[0]).ids
    assert ids[0] == 0  # what the tokenizer puts before a text
    has(said, f"web: 1 files, {(tmp_path / 'web.jsonl').stat().st_size:,} bytes", "books: 60 files")
    has(said, f"{len(ids)} tokens and end-of-text", f":{ids[0]} ")
    first = [documents(*one)[number] for one in ((1,), (2, 60)) for number in (0, 2)]
    has(said, *(json.dumps(text, ensure_ascii=False)[:60] for text in first))


def test_a_character_that_the_tokenizer_does_not_know_is_named_with_its_files(tmp_path, texts, refused):
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    del described["model"]["vocab"]["Ą"]  # byte 4
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "books/59.txt").write_text("one\nt\4o\n")
    call = (*texts, "--out", tmp_path / "out", "--processes", 2)
    has(only(refused(*call)), f" to {tmp_path / 'books/59.txt'}: ", "'\\x04' (U+0004)", "line 2")


def test_input_that_cannot_be_read_ends_the_call_and_is_not_laid_to_fastokens(tmp_path, texts, run):
    (tmp_path / "books/00.txt").write_bytes(b"\0")
    _, _, problems = run("prepare", *texts, "--out", tmp_path / "out")
    has(only(problems), "error: ", "00.txt", "not UTF-8")
