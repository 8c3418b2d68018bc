"""The versions that must be the same on every host."""

import shutil

import pytest

from megamoe.launch.versions import absent_packages, source_digest, version_problems


def test_version_problems_name_each_package_and_host_once():
    hosts = {"h1": {"torch": "2.13", "python": "3.11"}, "h2": {"torch": "2.13", "python": "3.10"}, "h3": {"torch": "2"}}
    assert version_problems(hosts) == [
        "h2 has python 3.10, but h1 has 3.11; install the same on every host.",
        "h3 has torch 2, but h1 has 2.13; install the same on every host.",
        "h3 has python None, but h1 has 3.11; install the same on every host.",
    ]


@pytest.fixture
def package(tmp_path):
    """A package with two files of one name."""
    for name, source in (("__init__.py", ""), ("data/order.py", "a = 1\n"), ("model/order.py", "b = 2\n")):
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "package"


def test_the_digest_of_a_package_changes_with_a_file_or_its_place_and_not_with_the_packages_place(package, tmp_path):
    before = source_digest(package)
    copy = shutil.copytree(package, tmp_path / "other")
    assert source_digest(copy) == before
    (copy / "model" / "order.py").write_text("b = 3\n")
    assert source_digest(copy) != before
    (package / "data").rename(package / "dates")  # the files' names, contents and order stay
    assert source_digest(package) != before


def test_packages_that_are_missing_are_named(tmp_path):
    lines = ['"torch>=1,<2",', '"absent>=3",', '"gone",', "\"backport>=1; python_version < '3.0'\","]
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text("dependencies = [\n" + "\n".join(lines) + "\n]\n")
    assert absent_packages(pyproject) == ["absent", "gone"]
