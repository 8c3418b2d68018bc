"""Sources of the user's own, by MODULE:NAME."""

import re
import sqlite3
import sys
from pathlib import Path

import pytest
from ranks import run_ranks
from refusals import has, refusal
from toy import ds_config, losses, train_here, write_inputs

from megamoe.data.sources import Location, open_source

SOURCE = """
import numpy as np

class Counting:
    fingerprint = "counting, version 1"

    def __init__(self, seq_len):
        self.seq_len = seq_len
        self.num_samples = 7

    def sample(self, index, ahead=0):
        ids = np.arange(index, index + self.seq_len + 1 + ahead)
        return ids[: self.seq_len], [-100, *ids[2:]], [2]

class Empty(Counting):
    num_samples = property(lambda self: 0, lambda self, value: None)

class Long(Counting):
    def sample(self, index, ahead=0):
        return ([range(100), [1], []], [[1], range(10), []], [[1], [-1], []])[index]

class Borders(Counting):
    def sample(self, index, ahead=0):
        return np.arange(5), [], [[0], [2, 2], [5]][index]

def longer(seq_len):
    return Counting(seq_len + 1)

def nothing(seq_len):
    return object()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_source.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_source", None)


def test_a_source_of_the_users_own_gives_its_samples_if_a_model_can_read_them(own):
    def opened(name, seq_len=4, vocab_size=50):
        return open_source(Location(Path(name)), seq_len, vocab_size, scan=True)

    source = opened("own_source:Counting")
    assert (source.num_samples, source.fingerprint) == (7, "counting, version 1")
    found = [part.tolist() for part in source.sample(3, ahead=1)]
    assert found == [[3, 4, 5, 6], [-100, 5, 6, 7, 8], [2]]
    for name, *parts in (
        ("no_such_module:Mine", "PYTHONPATH"),
        ("own_source:Mine", "PYTHONPATH"),
        ("own_source:Empty", "a sample or more"),
        ("own_source:nothing", "lacks", "fingerprint"),
        ("own_source:longer", "seq_len 4"),
    ):
        has(refusal(opened, name), name, *parts)
    for index, said in enumerate(("100 ids, where 1 to 4", "10 labels, where 0 to 1", "1 labels")):
        has(refusal(opened("own_source:Long").sample, index), f"sample {index}", said)
    has(refusal(opened("own_source:Counting", vocab_size=5).sample, 2), "from 0 to 4")
    for index in range(3):
        has(refusal(opened("own_source:Borders", 5).sample, index), f"sample {index}", "starts", "1 to 4")


def train_in(folder, run):
    with pytest.MonkeyPatch.context() as patch:  # a rank is kept for other tests
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        return train_here(run)


def test_the_example_of_the_docs_trains(tmp_path, monkeypatch):
    docs = (Path(__file__).parents[2] / "docs/reference/data.md").read_text()
    (code,) = re.findall(r"```python\n(import sqlite3\n.*?)```", docs, re.DOTALL)
    assert len(code.splitlines()) <= 32
    (tmp_path / "my_source.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with sqlite3.connect("documents.db") as database:
        database.execute("CREATE TABLE documents (text)")
        database.executemany("INSERT INTO documents VALUES (?)", [(f"{n} " * (3 + n % 9),) for n in range(40)])
    run = {**write_inputs(tmp_path, ds_config(2)), "run_dir": str(tmp_path / "run"), "steps": 3}
    (log,) = run_ranks(1, train_in, tmp_path, {**run, "data": ["my_source:Documents"], "eval_interval": 0})
    assert len(losses(log)) == 3
    sys.modules.pop("my_source", None)
