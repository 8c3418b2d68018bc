"""Command lines: one sentence for each problem, exit code 2, no stack trace."""

import errno
import os

import pytest
from refusals import has

from megamoe import cli
from megamoe.errors import PeerError, UserError


def parser():
    made = cli.Parser(prog="program")
    made.add_argument("--steps", type=int, default=7)
    made.add_argument("--seed", action="store")
    made.add_argument("--data", nargs="+")
    made.add_argument("--resume", action="store_true")
    return made


def refusals(*words):
    with pytest.raises(UserError) as caught:
        parser().parse(list(words))
    return caught.value.problems


def refusal(*words):
    (problem,) = refusals(*words)
    return problem


def outcome(main, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    return caught.value.code, capsys.readouterr()


def test_options_are_read_and_have_defaults():
    values = parser().parse(["--seed", "-1", "--data", "a", "b=2", "--resume"])
    assert vars(values) == {"steps": 7, "seed": "-1", "data": ["a", "b=2"], "resume": True}


def test_an_option_given_twice_with_different_values_is_refused_with_both():
    assert refusal("--steps", "3", "--steps=4") == "--steps is given twice, as 3 and as 4; keep one."
    assert refusal("--seed=3", "--seed", "4") == "--seed is given twice, as 3 and as 4; keep one."
    assert refusal("--data", "a", "b", "--data", "c") == "--data is given twice, as a b and as c; keep one."


def test_an_option_given_twice_is_refused_even_where_the_second_is_the_default():
    assert refusal("--steps", "3", "--steps", "7") == "--steps is given twice, as 3 and as 7; keep one."


def test_an_option_given_twice_with_the_same_value_is_fine():
    words = ["--steps", "3", "--data", "a", "b", "--steps=3", "--data", "a", "b", "--resume", "--resume"]
    values = parser().parse(words)
    assert (values.steps, values.data, values.resume) == (3, ["a", "b"], True)


def test_a_parser_forgets_the_command_line_before():
    one = parser()
    assert [one.parse(["--seed", seed]).seed for seed in ("1", "2")] == ["1", "2"]


def test_an_unknown_option_names_the_nearest():
    for words in (["--sede", "3"], ["--sede=3"]):
        assert refusal(*words) == 'command line: unknown option "--sede"; did you mean "--seed"?'


def test_an_option_near_to_none_names_them_all():
    problem = refusal("--zzz")
    assert all(option in problem for option in ('"--zzz"', "--steps", "--seed", "--data", "--resume"))


def test_every_unknown_option_is_named_at_once():
    first, second = refusals("--sede", "3", "--stepps=4")
    assert "--seed" in first
    assert "--steps" in second


def test_an_unknown_option_hides_no_other_problem_of_the_command_line():
    problems = refusals("--stepps", "3", "--seed", "1", "--seed", "2", "--data")
    assert len(problems) == 3
    has(" ".join(problems), 'unknown option "--stepps"', "--seed is given twice", "--data: expected at least one")

    def check(values):
        raise UserError(f"steps is {values.steps}; raise it.", "the name is missing; give one.")

    with pytest.raises(UserError) as caught:
        parser().parse(["--sede", "3", "--steps", "0"], check)
    assert len(caught.value.problems) == 3
    has(str(caught.value), 'unknown option "--sede"', "steps is 0", "the name is missing")


def test_what_checks_the_values_may_turn_them_into_something_else():
    assert parser().parse(["--steps", "3"], lambda values: values.steps + 1) == 4


def test_an_option_is_not_taken_by_its_beginning():
    assert "did you mean" in refusal("--step", "3")


def test_a_word_that_belongs_to_no_option_is_refused():
    problem = refusal("--seed", "3", "stray")
    assert "'stray'" in problem
    assert "--help" in problem


def test_a_value_of_the_wrong_kind_and_a_missing_value_are_refused():
    assert all(part in refusal("--steps", "many") for part in ("--steps", "int", "'many'", "--help"))
    assert all(part in refusal("--seed") for part in ("--seed", "expected one argument", "--help"))


def test_run_exits_with_0_after_work_well_done(capsys):
    code, said = outcome(lambda: print("done"), capsys)
    assert (code, said.out, said.err) == (0, "done\n", "")


def test_run_exits_with_2_and_one_line_for_each_problem(capsys):
    def main():
        raise UserError("the size is 3, above 2; lower it.", "the name is empty; give one.")

    code, said = outcome(main, capsys)
    assert code == 2
    assert said.out == ""
    assert said.err == "error: the size is 3, above 2; lower it.\nerror: the name is empty; give one.\n"


def test_run_exits_with_1_for_what_a_restart_can_cure(capsys):
    def main():
        raise PeerError("h2 cannot be reached; see that it is up.")

    code, said = outcome(main, capsys)
    assert (code, said.err) == (1, "error: h2 cannot be reached; see that it is up.\n")


def test_a_wrong_command_line_ends_with_2_and_no_stack_trace(capsys):
    code, said = outcome(lambda: parser().parse(["--steps", "3", "--steps", "4"]), capsys)
    assert code == 2
    assert said.err == "error: --steps is given twice, as 3 and as 4; keep one.\n"


def test_help_exits_with_0_and_names_the_options(capsys):
    code, said = outcome(lambda: parser().parse(["--help"]), capsys)
    assert code == 0
    assert "--steps" in said.out


def test_a_reader_that_has_gone_ends_the_program_without_a_word(capsys):
    def main():
        raise BrokenPipeError

    code, said = outcome(main, capsys)
    assert (code, said.err) == (1, "")  # not 0: a launcher must not take a rank that left for one that is done


def test_a_full_disk_is_one_sentence_with_the_file(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/log.jsonl")

    code, said = outcome(main, capsys)
    assert code == 2
    assert said.err == "error: runs/log.jsonl: No space left on device; fix it and try again.\n"


def test_a_bug_keeps_its_stack_trace():
    def main():
        raise KeyError("oops")

    with pytest.raises(KeyError, match="oops"):
        cli.run(main)


def test_run_exits_with_130_after_ctrl_c_and_says_nothing(capsys):
    def main():
        raise KeyboardInterrupt

    code, said = outcome(main, capsys)
    assert (code, said.out, said.err) == (130, "", "")


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
