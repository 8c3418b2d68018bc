"""A corpus from units: the same bytes whatever the processes and after any kill."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from refusals import has, only
from tokenizers.processors import TemplateProcessing

from megamoe.commands import prepare_data
from megamoe.data import inputs, preparation
from megamoe.data.cache import Cache
from megamoe.data.corpus_record import read_record
from megamoe.data.object_store import RemoteFolder
from megamoe.data.sources import open_corpus
from megamoe.data.token_files import TokenCorpus
from megamoe.data.tokenizer import load_tokenizer, train_tokenizer

PROGRAM = """
if __name__ == "__main__":
    from megamoe.commands import prepare_data
    from megamoe.config import cli
    from megamoe.data import inputs, preparation

    inputs.UNIT = 2000
    cli.run(prepare_data.main)
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
    """(exit code, problems, what it prints) of a call with small units."""
    monkeypatch.setattr(inputs, "UNIT", 4500)

    def prepare(*words):
        code, said = run(prepare_data, *words)
        return code, [line for line in said.err.splitlines() if line.startswith("error: ")], said.out

    return prepare


def content(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def texts_of(folder, split):
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    corpus = TokenCorpus(folder / split, 1, 400)
    return [tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) for ids in corpus.documents()]


def test_any_number_of_processes_gives_the_same_bytes_and_every_document_once(tmp_path, texts, prepare):
    (tmp_path / "books/00a.txt").write_text(documents(1)[0])
    options = ("--valid_fraction", 0.5, "--drop_duplicates")
    for processes in (1, 3):
        code, problems, _ = prepare(*texts, *options, "--processes", processes, "--out", tmp_path / f"{processes}")
        assert (code, problems) == (0, [])
    assert content(tmp_path / "1") == content(tmp_path / "3")
    record = read_record(tmp_path / "1")
    assert [len(split.shards) for split in record.splits.values()] == [len(inputs_of(texts))] * 2
    found = [text for split in ("train", "valid") for text in texts_of(tmp_path / "1", split)]
    assert sorted(found) == sorted([*documents(1), *documents(2, 60)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "books", "tokenizer.json", "web.jsonl"]
    remote = RemoteFolder(
        f"file://{tmp_path / '1'}", Cache(str(tmp_path / "cache"), 1 << 30)
    )  # it has all that it needs
    sets = [open_corpus(str(tmp_path / "1"), "train", 9, 400, True, one) for one in (None, remote)]
    assert [ids.tolist() for ids in sets[1].documents()] == [ids.tolist() for ids in sets[0].documents()]


def test_a_glob_that_the_shell_expands_gives_what_a_quoted_one_gives(tmp_path, texts, prepare):
    words = sorted((tmp_path / "books").glob("*.txt")), [tmp_path / "books" / "*.txt"]
    for number, some in enumerate(words):
        assert prepare(*some, *texts[2:], "--processes", 1, "--out", tmp_path / f"{number}")[:2] == (0, [])
    assert content(tmp_path / "0") == content(tmp_path / "1")


def inputs_of(texts):
    sources = {name: inputs.input_files(Path(path)) for name, path in (word.split("=") for word in texts[:2])}
    return inputs.units_of(sources, ["text"])


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
        assert prepare(*texts, "--out", tmp_path / out, "--processes", 1)[:2] == (0, [])
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_an_unfinished_corpus_refuses_other_settings_and_other_input(tmp_path, texts, prepare, monkeypatch):
    monkeypatch.setattr(prepare_data, "SAMPLE", 100)  # so that the bad document is met after others
    bad = tmp_path / "books/99.txt"
    bad.write_bytes(b"caf\xe9")
    code, problems, _ = prepare(*texts, "--out", tmp_path / "out", "--processes", 1)
    assert code == 2
    has(only(problems), str(bad), "0xe9")
    for change, *words in (
        (lambda: None, "min_chars, valid_fraction", "--min_chars", 9, "--valid_fraction", 0.5),
        (lambda: bad.write_text("fixed"), "input"),
        (lambda: monkeypatch.setattr(prepare_data, "__version__", "9"), "input, version"),
    ):
        change()
        code, problems, _ = prepare(*texts, *words[1:], "--out", tmp_path / "out")
        assert code == 2
        has(only(problems), str(tmp_path / ".out.partial"), f"another {words[0]};", "remove that folder")
    shutil.rmtree(tmp_path / ".out.partial")
    assert prepare(*texts, "--out", tmp_path / "out")[0] == 0


def test_what_is_finished_stays_on_a_full_disk_and_the_error_names_the_output(tmp_path, texts, prepare, monkeypatch):
    def write(*args, **options):
        raise OSError(28, "No space left on device")

    call = (*texts, "--out", tmp_path / "out", "--processes", 1)
    with monkeypatch.context() as full:
        full.setattr(preparation, "write_corpus_record", write)
        code, problems, _ = prepare(*call)
    assert code == 2
    has(only(problems), str(tmp_path / "out"), "No space left")
    code, _, said = prepare(*call)
    assert code == 0
    units = len(inputs_of(texts))
    has(said, f"{units} of {units} units are finished already")


def test_only_what_the_options_select_is_taken_and_all_else_is_counted(tmp_path, texts, prepare):
    (tmp_path / "books/98.txt").write_text(documents(1)[0])
    (tmp_path / "books/99.txt").write_text("\n")
    options = ("--where", "score!=1", "score<3", "--min_chars", 100, "--max_chars", 600, "--valid_fraction", 0)
    out = tmp_path / "out"
    code, problems, said = prepare(*texts, *options, "--drop_duplicates", "--processes", 1, "--out", out)
    assert (code, problems) == (0, [])
    web = [text for number, text in enumerate(documents(1)) if number % 4 in (0, 2)]
    expected = {}
    for name, some in (("web", web), ("books", [*documents(2, 60), documents(1)[0]])):
        expected[name] = [text for text in some if 100 <= len(text) <= 600]
        dropped = {
            "where": 150 * (name == "web"),
            "short": sum(len(text) < 100 for text in some),
            "long": sum(len(text) > 600 for text in some),
            "empty": int(name == "books"),
            "duplicate": int(name == "books"),
        }
        expected[name] = expected[name][: len(expected[name]) - dropped["duplicate"]]
        (source,) = [one for one in read_record(out).sources if one.name == name]
        assert source.dropped == {reason: count for reason, count in dropped.items() if count}
        assert source.documents == len(expected[name])
        assert source.bytes == sum(len(text.encode()) for text in expected[name])
        has(
            said, f"{name}: {source.documents} documents, {source.tokens} tokens", f"{dropped['short']} dropped (short)"
        )
    assert texts_of(out, "train") == [*expected["web"], *expected["books"]]
    record = read_record(out)
    lengths = np.array([len(ids) for ids in TokenCorpus(out / "train", 1, 400).documents()])
    assert record.lengths == {
        str(2**k): int(n) for k in range(15) if (n := ((2**k <= lengths) & (lengths < 2 ** (k + 1))).sum())
    }
    assert sum(source.tokens for source in record.sources) == record.splits["train"].tokens == lengths.sum()


def test_a_dry_run_shows_documents_with_their_tokens_and_writes_nothing(tmp_path, texts, prepare):
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    (name,) = tokenizer.get_added_tokens_decoder().values()
    tokenizer.post_processor = TemplateProcessing(f"{name} $0", special_tokens=[(str(name), 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    before = sorted(tmp_path.rglob("*"))
    code, problems, said = prepare(*texts, "--out", tmp_path / "out", "--dry_run")
    assert (code, problems) == (0, [])
    assert sorted(tmp_path.rglob("*")) == before
    ids = tokenizer.encode(documents(1)[0]).ids
    assert ids[0] == 0  # what the tokenizer puts before a text
    has(said, f"web: 1 files, {(tmp_path / 'web.jsonl').stat().st_size:,} bytes", "books: 60 files")
    has(said, f"{len(ids)} tokens and end-of-text", f":{ids[0]} ")
    first = [documents(*one)[number] for one in ((1,), (2, 60)) for number in (0, 2)]
    has(said, *(json.dumps(text, ensure_ascii=False)[:60] for text in first))


def test_a_character_that_the_tokenizer_does_not_know_is_named_with_its_files(tmp_path, texts, prepare):
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    del described["model"]["vocab"]["Ą"]  # byte 4
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "books/59.txt").write_text("one\nt\4o\n")
    code, problems, _ = prepare(*texts, "--out", tmp_path / "out", "--processes", 2)
    assert code == 2
    has(only(problems), f" to {tmp_path / 'books/59.txt'}: ", "'\\x04' (U+0004)", "line 2")


def test_input_that_cannot_be_read_ends_the_call_and_is_not_laid_to_fastokens(tmp_path, texts, run):
    (tmp_path / "books/00.txt").write_bytes(b"\0")
    code, said = run(prepare_data, *texts, "--out", tmp_path / "out")
    assert code == 2
    has(only([line for line in said.err.splitlines() if "not UTF-8" in line]), "error: ", "00.txt")


def test_tables_without_a_column_are_named_all_at_once(tmp_path, texts, prepare):
    import pyarrow
    import pyarrow.parquet

    for name in ("a", "b", "c"):
        column = "text" if name == "b" else "body"
        pyarrow.parquet.write_table(pyarrow.table({column: ["x"]}), tmp_path / f"{name}.parquet")
    code, problems, _ = prepare(tmp_path / "*.parquet", *texts[2:], "--out", tmp_path / "out")
    assert code == 2
    for problem, name in zip(problems, ("a", "c"), strict=True):
        has(problem, f"{name}.parquet", "no column text", "--text_key")
    assert not list(tmp_path.glob(".out*"))
