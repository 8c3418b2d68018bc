"""What make and tools/install.sh refuse on machines that lack something, before they install anything."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import has

ROOT = Path(__file__).parent.parent
# What a Python that is too old, or without Debian's python3-venv, does with `-c PROGRAM` and `--version`.
TOO_OLD = '#!/bin/sh\n[ "$1" != --version ] || echo Python 3.9.2\nexit 1\n'
WITHOUT_VENV = '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec "{python}" "$@"\n'
NEW = '#!/bin/sh\n[ $1 != -m ] || {{ mkdir -p .venv/bin; ln -s "{python}" .venv/bin/python; echo made; exit 3; }}\n'

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="this host has no make")


@pytest.fixture
def checkout(tmp_path):
    """A folder, with a space in its path, that has what make reads."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("megamoe", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "Makefile", folder)  # a lock on it is this test's alone
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools/install.sh", folder / "tools")
    return folder


def make(folder, *words, path=os.environ["PATH"]):
    """Returns make's exit code, and what it has said."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    environment = {**clean, "PATH": path, "LC_ALL": "C"}
    done = subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_options_of_make_are_those_of_megamoe_train_and_paths_may_have_spaces(checkout):
    code, said = make(checkout, "-n", "train", "TEXT=my text.txt", "RUN=runs/my run", "STEPS=60", "PRESET=tiny")
    assert code == 0, said
    has(said, "megamoe train --text 'my text.txt' --preset tiny --schedule_steps 60 --run_dir 'runs/my run'\n")
    assert "fetch_corpus" not in said
    has(make(checkout, "-n", "train")[1], "fetch_corpus.py --out data/plays\n", "megamoe train --text 'data/plays'")


def test_a_checkout_that_was_moved_with_its_environment_is_refused(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv/.train").write_text(f"{checkout}\n")
    assert make(checkout, "-n", "train")[0] == 0
    (checkout / ".venv/.train").write_text("/home/me/before\n")
    code, said = make(checkout, "-n", "train")
    assert code == 2
    has(said, f".venv was made in /home/me/before and cannot be moved to {checkout}; remove it, rm -r .venv")


def programs(folder, **texts):
    """A PATH with these programs in place of the host's Python."""
    folder.mkdir()
    for name in ("sh", "make", "cat", "rm", "ln", "mkdir", "find", "test", "flock"):
        (folder / name).symlink_to(shutil.which(name))
    for name, text in texts.items():
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(stat.S_IRWXU)
    return str(folder)


@pytest.mark.parametrize(
    ("python", "problem"),
    [
        (None, "error: there is no python3; install Python 3.10 or newer, or name another: make train PYTHON="),
        (TOO_OLD, "error: python3 is Python 3.9.2, but megamoe needs 3.10 or newer; install one, or name another: "),
        (WITHOUT_VENV, "error: python3 lacks venv or ensurepip; install them (Debian, Ubuntu: apt install python3-"),
    ],
)
def test_a_python_that_will_not_do_is_refused_and_nothing_is_made(python, problem, checkout, tmp_path):
    path = programs(tmp_path / "bin", **({"python3": python} if python else {}))
    code, said = make(checkout, "train", path=path)
    assert code == 2
    has(said, problem)
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("why", ["gone", "too old"])
def test_an_environment_whose_python_is_gone_or_too_old_is_made_again(why, checkout, tmp_path):
    broken = checkout / ".venv/bin"
    broken.mkdir(parents=True)
    for name in ("python", "python3"):
        if why == "gone":  # the host had it once
            (broken / name).symlink_to(tmp_path / "none")
        else:
            (broken / name).write_text(TOO_OLD)
            (broken / name).chmod(stat.S_IRWXU)
    if why == "gone":
        (checkout / ".venv/.train").write_text(f"{checkout}\n")
    code, said = make(checkout, "train", path=programs(tmp_path / "bin", python3=NEW))
    assert code == 2  # the stand-in ends there
    assert "\nmade\n" in said
    assert not (broken / "python3").is_symlink()


def test_an_environment_of_the_user_that_works_is_kept(checkout, tmp_path):
    theirs = checkout / ".venv/bin"
    theirs.mkdir(parents=True)
    (theirs / "python").write_text('#!/bin/sh\n[ "$2" != pip ] || echo "$@"\n')  # installs nothing
    (theirs / "python").chmod(stat.S_IRWXU)
    package = checkout / ".venv/lib/python3/site-packages/a.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").touch()
    whole = shutil.copytree(package, package.with_name("b.dist-info"))
    (whole / "INSTALLER").touch()
    code, said = make(checkout, ".venv/.train", path=programs(tmp_path / "bin", python3=NEW))
    assert code == 0, said
    has(said, "-m pip install", "--editable .")
    assert (checkout / ".venv/.train").read_text() == f"{checkout}\n"
    # pip was interrupted at the first, and would leave it as it is
    assert [path.name for path in package.parent.iterdir()] == ["b.dist-info"]
