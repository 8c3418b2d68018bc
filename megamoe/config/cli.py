"""Command lines for users: one sentence per problem and exit code 2, no stack trace, no option twice."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NoReturn

from pydantic import BaseModel

from megamoe.utils.errors import PeerError, Problems, UserError, unknown_key
from megamoe.utils.interrupts import on_interrupt


class _Once(argparse.Action):
    """Stores a value, and refuses a second, different one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        given = parser.given
        if self.dest in given and given[self.dest] != values:
            parser.problems.append(
                f"{option} is given twice, as {_shown(given[self.dest])} and as {_shown(values)}; keep one."
            )
        given[self.dest] = values
        setattr(namespace, self.dest, values)


def _shown(values: Any) -> str:
    return " ".join(map(str, values)) if isinstance(values, list) else str(values)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose problems are UserErrors, with the nearest option for an unknown one."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)
        self.given: dict[str, Any] = {}
        self.problems = Problems()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see --help.")

    def parse(
        self, arguments: list[str] | None = None, check: Callable[[argparse.Namespace], Any] | None = None
    ) -> Any:
        """Parse `arguments` (default: the command line). Raises one UserError with all problems.

        Args:
            check: raises UserError for what is wrong with the values; what it returns is returned instead of them.
        """
        words = sys.argv[1:] if arguments is None else arguments
        self.problems = Problems(self._unknown_options(words))
        values, rest = self.problems.attempt(self.parse_known_args, words) or (None, [])
        if rest and not self.problems:
            self.problems.append(f"command line: {rest[0]!r} belongs to no option; see --help.")
        result = self.problems.attempt(check, values) if values and check else values
        self.problems.refuse()
        return result

    def _unknown_options(self, words: list[str]) -> list[str]:
        known = self._option_string_actions
        options = [word.split("=")[0] for word in words if word.startswith("--") and word != "--"]
        shown = [option for option in known if option.startswith("--")]
        return [unknown_key("command line", option, shown, "option") for option in options if option not in known]


def add_fields(
    parser: argparse.ArgumentParser, model: type[BaseModel], names: Iterable[str] = (), **special: dict[str, Any]
) -> None:
    """Give `parser` an option for each field of `model`, with its description as the help.

    Args:
        names: of the fields; by default all.
        special: further settings of an option, by field.
    """
    for name in names or model.model_fields:
        field = model.model_fields[name]
        options: dict[str, Any] = {"help": field.description, "default": None if field.is_required() else field.default}
        options |= {"action": "store_true"} if field.annotation is bool else {"metavar": name.upper()}
        parser.add_argument(f"--{name}", **{**options, **special.get(name, {})})


class Console:
    """A standard stream to a pipe, terminal or disk that may go away: then what is written is dropped, no more."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit: 0, 130 after Ctrl-C, 2 after printing the problems of a UserError or the file system, or 1
    after those of a PeerError."""
    try:
        main()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        sys.exit(1 if isinstance(error, PeerError) else 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, head or less, has exited
        sys.exit(1)
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror}; fix it and try again.", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def run_command(name: str) -> NoReturn:
    """`run` the module of that name in `commands/`. Ctrl-C while that is imported ends the process as quietly."""
    on_interrupt(signal.SIG_DFL)
    command = import_module(f"megamoe.commands.{name}")
    on_interrupt(signal.default_int_handler)
    run(command.main)
