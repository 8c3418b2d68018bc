"""Each command of README, CONTRIBUTING and docs/ is one that its program takes.

Every shell block is read. `megamoe`, `python tools/...`, what launchers and launch_scripts/ start, and `make` are
checked by the parser of the program itself, and the files of the repository that a command names must be there; the
programs do not run. What ends in seconds runs for real: `megamoe plan` without a search. A block that begins with
`# needs: ...`, for what a reader must have first, is left out.
"""

import argparse
import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from megamoe.__main__ import make_app
from megamoe.config import cli
from megamoe.utils.errors import UserError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
FOLDERS = ("docs/", "ds_configs/", "launch_scripts/", "megamoe/", "tests/", "tools/")
PROGRAM = re.compile(r"\s*([A-Z_]+=\S* )*(megamoe|python|deepspeed|torchrun|srun|sbatch|make|launch_scripts/)")


class Parsed(BaseException):
    pass  # in place of what a program does next


def parse_only(app, words, parse=cli.parse):
    parse(app, words)
    raise Parsed


def parse_args_only(parser, parse_args=argparse.ArgumentParser.parse_args):
    try:
        parse_args(parser)
    except SystemExit:
        raise UserError("argparse refuses it") from None
    raise Parsed


def commands(text):
    """The words of each command in the shell blocks of a page."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if kind not in ("", "bash", "sh", "console") or block.startswith("# needs: "):
            continue
        block = re.sub(r"^python3? - <<'END'$.*?^END$", "", block, flags=re.MULTILINE | re.DOTALL)
        for line in re.sub(r"\$\{?[a-z]+\}?", "1024", block.replace("\\\n", " ")).splitlines():
            line = re.sub(r"^\s*(\$|do) ", "", line)
            if PROGRAM.match(line):
                split = itertools.groupby(shlex.split(line, comments=True), lambda word: word in ("&&", "|"))
                yield from (list(words) for is_operator, words in split if not is_operator)


def refuse_unknown(words):
    """Raise UserError for a command that its program would not take."""
    program, *rest = itertools.dropwhile(re.compile("[A-Z_]+=").match, words)
    for path in (word.rpartition("=")[2] for word in words):
        if path.startswith(FOLDERS) and not (ROOT / path).exists():
            raise UserError(f"{path} does not exist")
    script = next((word for word in [program, *rest] if word.endswith((".py", ".sh", ".sbatch"))), None)
    if program == "megamoe":
        cli.parse(make_app(), rest)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in rest:
            known = rf"\$\({word.partition('=')[0]}[:)]" if "=" in word else rf"^\.PHONY:.* {word}\b"
            if not re.search(known, makefile, re.MULTILINE):
                raise UserError(f"the Makefile has no {word}")
    elif script:
        after = words[words.index(script) + 1 :]
        if script.endswith((".sh", ".sbatch", "megamoe/pretrain.py")):
            options = itertools.dropwhile(lambda word: not word.startswith("--"), after)
            cli.parse(make_app(), ["train", *options])
        elif verb := re.search(r'^    main\("(\w+)"\)$', (ROOT / script).read_text(), re.MULTILINE):
            cli.parse(make_app(), [verb[1], *after])
        else:
            with pytest.MonkeyPatch.context() as patched, pytest.raises(Parsed):  # noqa: PT012
                patched.setattr(cli, "parse", parse_only)
                patched.setattr(cli, "run", lambda main: main())
                patched.setattr(argparse.ArgumentParser, "parse_args", parse_args_only)
                patched.setattr(sys, "argv", [script, *after])
                runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_command_of_a_page_is_one_that_its_program_takes(page):
    problems = {}
    for words in commands(page.read_text()):
        try:
            refuse_unknown(words)
        except UserError as error:
            problems[shlex.join(words)] = str(error)
    assert problems == {}


def test_a_plan_of_the_docs_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [words for page in PAGES for words in commands(page.read_text())]
    plans = [words for words in found if words[:2] == ["megamoe", "plan"] and "--best" not in words]
    assert plans
    for words in plans:
        cli.parse(make_app(), words[1:])()
        assert "predicted memory per rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "megamoe plam --gpus 8",
        "megamoe plan --gpus 8 --ds_config x.json --no_such_option",
        "megamoe plan --gpus eight --ds_config x.json",
        "megamoe plan --gpus 8 --ds_config ds_configs/none.json",
        "python tools/generate.py runs/mine --no_such_option",
        "python tools/dev/benchmark_reduction.py --no_such_option",
        "A=1 launch_scripts/none.sh 2 --preset tiny",
        "launch_scripts/single_node.sh 2 --no_such_option",
        "deepspeed --num_gpus 2 megamoe/pretrain.py --steps few",
        "make train NOTHING=1",
    ],
)
def test_a_command_that_no_program_takes_is_found(line):
    (words,) = commands(f"```bash\n{line}\n```\n")
    with pytest.raises(UserError):
        refuse_unknown(words)
    assert not [*commands(f"```bash\n# needs: nothing\n{line}\n```\n")]
