"""The command megamoe."""

import logging
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from refusals import has, refusal

import megamoe
from megamoe.__main__ import VERBS, main


def test_every_command_has_its_verb():
    modules = {path.stem for path in (Path(megamoe.__file__).parent / "commands").glob("[!_]*.py")}
    assert VERBS.keys() == modules - {"options", "models"}


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_says_what_it_does_with_an_example(verb, call):
    text = " ".join(" ".join(call(verb, "--help")).split())
    has(text, f"Usage: megamoe {verb} ", *VERBS[verb], "--verbose")


def test_an_unknown_verb_is_refused_with_the_nearest(call):
    has(refusal(call, "evalute"), 'unknown command "evalute"', 'did you mean "evaluate"?')
    text = "\n".join(call("--help"))
    has(text, *VERBS)
    assert "\n".join(call()) == text


@pytest.mark.parametrize("options", [[], ["--verbose"]])
def test_deepspeeds_warnings_are_shown_on_demand_only(options, monkeypatch, tmp_path):
    logger = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(sys, "argv", ["megamoe", "report", str(tmp_path), *options])
    with pytest.raises(SystemExit):
        main()
    for level, is_shown in ((logging.WARNING, bool(options)), (logging.ERROR, True)):
        assert bool(logger.filter(logger.makeRecord("", level, "", 0, "", (), None))) == is_shown


@pytest.mark.parametrize("verb", ["plan", "status", "generate", "chat", "evaluate", "convert", "inspect"])
def test_help_and_wrong_options_do_not_wait_for_torch(verb, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = partial(subprocess.run, capture_output=True, text=True, env=env)
    words = [sys.executable, "-m", "megamoe", verb]
    assert run([*words, "--help"]).stdout.startswith(f"Usage: megamoe {verb} ")
    assert 'unknown option "--unknown"' in run([*words, "--unknown"]).stderr


@pytest.mark.parametrize("program", [["-m", "megamoe"], [Path(megamoe.__file__).parents[1] / "tools/plan.py"]])
def test_an_interrupt_while_the_command_line_is_loaded_shows_no_stack_trace(program, tmp_path):
    (tmp_path / "cyclopts.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, *program, "--help"], capture_output=True, text=True, env=env)
    assert (run.returncode, run.stderr) == (-signal.SIGINT, "")


def test_bash_completes_verbs_and_options(call, tmp_path):
    call("--install_completion", "--shell", "bash", "--output", tmp_path / "script")
    ask = 'source $0; COMP_WORDS=(megamoe "$@"); COMP_CWORD=$#; _megamoe; echo "${COMPREPLY[@]}"'
    for words, found in (("gen", "generate"), ("--inst", "--install_completion"), ("chat --top", "--top_k --top_p")):
        command = ["bash", "-c", ask, tmp_path / "script", *words.split()]
        assert subprocess.run(command, capture_output=True, text=True).stdout == f"{found}\n"
