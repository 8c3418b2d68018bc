"""Command lines: one sentence for each problem, exit code 2, no stack trace."""

import errno
import os

import pytest
from pydantic import Field
from refusals import has, refusal, refusals

from megamoe.config import cli
from megamoe.config.cli import Options, Positional
from megamoe.utils.errors import PeerError, UserError


class Lengths(Options, group="Length"):
    steps: int = Field(default=7, gt=0, description="how far")
    data: list[str] = Field(default=[], description="what of")


class Toy(Lengths):
    model: Positional[str] = Field(description="which")
    seed: int = Field(description="of all that is drawn")
    resume: bool = Field(default=False, description="go on")


class Wrapper(Toy):
    words: Positional[list[str]] = Field(description="to hand on")


def parsed(*words, kind=Toy):
    app = cli.make_app("program")

    @app.default
    def program(options: kind):
        return options

    return cli.parse(app, list(words))()


def test_words_after_two_dashes_are_handed_on():
    values = parsed("m", "w", "--seed", "1", "--steps=3", "--", "--steps", "4", "--sede", "-x", kind=Wrapper)
    assert values == Wrapper(model="m", words=["w", "--steps", "4", "--sede", "-x"], seed=1, steps=3)


def test_an_option_given_twice_with_the_same_value_is_fine():
    words = "m --steps 3 --seed -1 --data a b --steps=3 --resume --data a b --local_rank=1 --resume=true"
    assert parsed(*words.split()) == Toy(model="m", seed=-1, steps=3, data=["a", "b"], resume=True)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("m --seed 1 --steps 3 --steps=4", ["--steps is given twice, as 3 and as 4; keep one."]),
        ("m --seed 1 --data a b --data c", ["--data is given twice, as a b and as c; keep one."]),
        ("m --seed 1 --steps 3 --steps 7", ["--steps is given twice, as 3 and as 7"]),  # the default
        ("m --seed 1 --resume --resume=false", ["--resume is given twice, as true and as false; keep one."]),
        ("m --seed 1 --sede=3", ['unknown option "--sede"; did you mean "--seed"?']),
        ("m --seed 1 --step 3", ['unknown option "--step"', "did you mean"]),  # not taken by its beginning
        ("m --seed 1 --zzz", ['"--zzz"', "--steps", "--seed", "--data", "--resume"]),
        ("--zzz m --seed 1", ['"--zzz"']),
        ("m --seed 1 -x", ["-x", "see --help."]),
        ("m --seed 1 --resume stray", ['"stray" belongs to no option; see --help.']),
        ("m --seed 1 --steps many", ['"steps"', '"many"', "integer", "change it"]),
        ("m --seed", ["--seed has no value; give one, after"]),
        ("m --seed 1 --data -x", ['--data has no value; give one, after "=" where it begins with "-".']),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_option_and_the_remedy(words, parts):
    has(refusal(parsed, *words.split()), *parts)


def test_all_problems_of_a_command_line_come_at_once():
    assert refusals(parsed) == [f"command line: {name} is missing; add it, see --help." for name in ("MODEL", "--seed")]
    assert len(refusals(parsed, "--zzz", "m")) == 2  # that and the seed
    words = ["--stepps", "3", "--sede=3", "--seed", "x", "--steps", "0", "--data", "a", "--data", "b"]
    # Not that a model is missing, which "3" may have been.
    parts = ('"--stepps"', '"--sede"', "--data is given twice", '"steps" is "0"', '"seed" is "x"')
    for problem, part in zip(refusals(parsed, *words), parts, strict=True):
        has(problem, part)


def test_help_shows_groups_and_defaults_as_values(capsys):
    assert parsed("m", "--help") is None
    before, after = capsys.readouterr().out.split(" Length ")
    has(before, "program --seed INT [OPTIONS] MODEL", "which", "[required]", "--resume", "go on")
    has(after, "--steps", "how far [default: 7]", "--data", " Other ", "--verbose")
    assert "False" not in before + after
    assert "[]" not in before + after


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
