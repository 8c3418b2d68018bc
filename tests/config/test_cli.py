"""Command lines: one sentence for each problem, exit code 2, no stack trace."""

import errno
import os

import pytest
from refusals import has, refusal, refusals

from megamoe.config import cli
from megamoe.utils.errors import PeerError, UserError


def parser():
    made = cli.Parser(prog="program")
    made.add_argument("--steps", type=int, default=7)
    made.add_argument("--seed", action="store")
    made.add_argument("--data", nargs="+")
    made.add_argument("--resume", action="store_true")
    return made


def test_an_option_given_twice_with_the_same_value_is_fine():
    words = ["--steps", "3", "--data", "a", "b", "--steps=3", "--data", "a", "b", "--resume", "--resume"]
    values = parser().parse(words)
    assert (values.steps, values.data, values.resume) == (3, ["a", "b"], True)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--steps 3 --steps=4", ["--steps is given twice, as 3 and as 4; keep one."]),
        ("--data a b --data c", ["--data is given twice, as a b and as c"]),
        ("--steps 3 --steps 7", ["--steps is given twice, as 3 and as 7"]),  # the default
        ("--sede=3", ['unknown option "--sede"; did you mean "--seed"?']),
        ("--step 3", ['unknown option "--step"', "did you mean"]),  # not taken by its beginning
        ("--zzz", ['"--zzz"', "--steps", "--seed", "--data", "--resume"]),
        ("--seed 3 stray", ["'stray'", "--help"]),
        ("--steps many", ["--steps", "int", "'many'", "--help"]),
        ("--seed", ["--seed", "expected one argument", "--help"]),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_option_and_the_remedy(words, parts):
    has(refusal(parser().parse, words.split()), *parts)


def test_all_problems_of_a_command_line_come_at_once():
    problems = refusals(parser().parse, ["--stepps", "3", "--sede=3", "--seed", "1", "--seed", "2", "--data"])
    assert len(problems) == 4
    has(" ".join(problems), '"--stepps"', '"--sede"', "--seed is given twice", "--data: expected at least one")

    def check(values):
        raise UserError(f"steps is {values.steps}; raise it.", "the name is missing; give one.")

    assert parser().parse(["--steps", "3"], lambda values: values.steps + 1) == 4
    problems = refusals(parser().parse, ["--sede", "3", "--steps", "0"], check)
    assert len(problems) == 3
    has(" ".join(problems), 'unknown option "--sede"', "steps is 0", "the name is missing")


ENDS = [  # what ends a program, its exit code, and what it says
    (
        UserError("the size is 3, above 2; lower it.", "the name is empty; give one."),
        2,
        "error: the size is 3, above 2; lower it.\nerror: the name is empty; give one.\n",
    ),
    # what a restart can cure
    (PeerError("h2 cannot be reached; see that it is up."), 1, "error: h2 cannot be reached; see that it is up.\n"),
    (BrokenPipeError(), 1, ""),  # not 0: a launcher must not take a rank that left for one that is done
    (
        OSError(errno.ENOSPC, "No space left on device", "runs/log.jsonl"),
        2,
        "error: runs/log.jsonl: No space left on device; fix it and try again.\n",
    ),
    (KeyboardInterrupt(), 130, ""),
]


@pytest.mark.parametrize(("end", "code", "said"), ENDS, ids=lambda one: type(one).__name__)
def test_the_exit_code_and_the_sentences_say_how_a_program_ended(capsys, end, code, said):
    def main():
        raise end

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    printed = capsys.readouterr()
    assert (caught.value.code, printed.out, printed.err) == (code, "", said)


def test_a_console_whose_reader_has_gone_drops_what_is_written():
    reading, writing = os.pipe()
    with open(writing, "w") as stream:
        console = cli.Console(stream)
        print("heard", file=console, flush=True)
        assert os.read(reading, 10) == b"heard\n"
        os.close(reading)
        print("not heard", file=console, flush=True)
        with pytest.raises(BrokenPipeError):
            stream.flush()
        assert console.fileno() == writing
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # so that it can be closed
