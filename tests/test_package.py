"""The sdist of a checkout, and the wheel of that, are complete, and work where there is no checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import megamoe

ROOT = Path(__file__).parent.parent
# What a checkout needs to be built; no build folder that a build before has left there.
BUILT = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "megamoe", "ds_configs")
SDIST = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"


def pip(*words):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing but the installed wheel of this checkout's sdist."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in BUILT:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    subprocess.run([sys.executable, "-c", SDIST, folder], cwd=source, check=True, capture_output=True)
    (sdist,) = folder.glob("megamoe-*.tar.gz")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist)
    (wheel,) = folder.glob("megamoe-*.whl")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", folder / "installed", wheel)
    return folder / "installed"


def files(folder):
    """Their paths; those behind a link to a folder, which a wheel holds as files, too."""
    return {
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, names in os.walk(folder, followlinks=True)
        if not place.endswith("__pycache__")
        for name in names
    }


def test_an_installed_package_has_every_file_with_the_recipes_the_license_and_the_mark_of_types(installed):
    assert (ROOT / "megamoe/config/recipes/tiny.json").is_file()
    assert (ROOT / "megamoe/py.typed").is_file()
    assert files(installed / "megamoe") == files(ROOT / "megamoe")
    (metadata,) = installed.glob("megamoe-*.dist-info")
    assert (metadata / "licenses/LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_an_installed_package_plans_prepares_and_says_where_it_lies(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}  # ahead of the checkout of an editable install

    def output(*command):
        done = subprocess.run([*map(str, command)], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert output(sys.executable, "-c", "import megamoe; print(megamoe.__file__)").startswith(str(installed))
    program = installed / "bin/megamoe"
    assert output(program, "--version").strip() == megamoe.__version__
    assert "2,565,760 parameters" in output(program, "plan", "--gpus", 2, "--preset", "tiny-plus")
    (tmp_path / "text.txt").write_text("a line of words that come again and again\n" * 400)
    output(program, "prepare", "text.txt", "--out", "data", "--vocab_size", 260)
    assert (tmp_path / "data/corpus.json").is_file()


def test_a_users_mypy_sees_the_types(installed, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = tmp_path.glob("env/lib/python*/site-packages")
    (site / "installed.pth").write_text(f"{installed}\n")
    (tmp_path / "use.py").write_text("from megamoe.utils.text import duration\n\nduration('an hour')\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", tmp_path / "env/bin/python", "use.py"]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)
    assert 'Argument 1 to "duration" has incompatible type "str"' in done.stdout
    assert "Found 1 error" in done.stdout
