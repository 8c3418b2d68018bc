"""What `pip wheel` makes of a checkout is complete, and works where there is no checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What a checkout needs to be built; no build folder that a build before has left there.
BUILT = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "megamoe", "ds_configs")


def pip(*words):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture
def installed(tmp_path):
    """A folder with nothing but the installed wheel of this checkout."""
    folder, source = tmp_path, tmp_path / "source"
    source.mkdir()
    for name in BUILT:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
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


USE = """
import runpy, sys
from pathlib import Path
import megamoe
from megamoe.checkpoint import folders, writer
from megamoe.config.model import load_preset
folder = Path(megamoe.__file__).parent
print(folder, load_preset("moe-680m").num_hidden_layers)
print(Path(writer.__file__).with_name(folders.SCRIPT).is_file())
sys.argv = ["pretrain.py", "--help"]
runpy.run_module("megamoe.pretrain", run_name="__main__")
"""


def test_an_installed_package_has_every_file_with_the_recipes_and_shows_its_help(installed):
    assert (ROOT / "megamoe/config/recipes/tiny.json").is_file()
    assert files(installed / "megamoe") == files(ROOT / "megamoe")
    environment = {**os.environ, "PYTHONPATH": str(installed)}  # ahead of the checkout of an editable install
    command = [sys.executable, "-c", USE]
    done = subprocess.run(command, env=environment, cwd=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{installed / 'megamoe'} 24\nTrue\n" in done.stdout
    assert "--ds_config" in done.stdout
