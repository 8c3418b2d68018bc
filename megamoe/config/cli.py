"""Command lines: classes of options, one sentence for each problem, exit code 2, no stack trace.

A command is a function of one or more `Options`, whose fields are its options. cyclopts reads the words and prints the
help; pydantic checks the values.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, TypeVar

from cyclopts import App, Argument, Group, Parameter
from cyclopts.exceptions import CycloptsError, MissingArgumentError, UnusedCliTokensError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megamoe.config.model import sentences
from megamoe.utils.errors import PeerError, Problems, UserError, shown, unknown_key


def _shown_default(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


T = TypeVar("T")
titled = functools.cache(functools.partial(Group.create_ordered, sort_key=0))  # in the order of their classes
LAST = Group.create_ordered("Other", sort_key=1)
POSITIONAL = Parameter()  # marks a field
Positional = Annotated[T, POSITIONAL]


@Parameter(name="*")
class Options(BaseModel):
    """The options of a command: a field is an option, its description the help. Those of a class with `group` stand
    together in the help, under this title."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verbose: Annotated[bool, Parameter(group=LAST, show_default=False)] = Field(
        default=False, kw_only=True, description="print what DeepSpeed says while it is loaded, too"
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:  # which `object`'s would not take
        super().__init_subclass__()

    @classmethod
    def __pydantic_init_subclass__(cls, group: str | None = None, **kwargs: Any) -> None:
        for name in cls.__annotations__:
            field = cls.model_fields[name]
            field.kw_only = POSITIONAL not in field.metadata
            says_nothing = field.default is None or field.default is False or field.default in ([], "")
            field.metadata.append(Parameter(show_default=False if says_nothing else _shown_default))
            if group:
                field.metadata.append(Parameter(group=titled(group)))
        # Those of a base class come after.
        cls.__pydantic_fields__ = dict(sorted(cls.model_fields.items(), key=lambda one: bool(one[1].kw_only)))


# Options are named as the fields, and a list takes all words up to the next option.
AS_FIELDS = Parameter(name_transform=str, negative=(), consume_multiple=(1, None))


def make_app(name: str, **settings: Any) -> App:
    """The app of a program; `settings` are those of cyclopts."""
    return App(name=name, default_parameter=AS_FIELDS, help_format="plaintext", **settings)


def parse(app: App, words: list[str]) -> Callable[[], Any]:
    """The command of `app` that `words` ask for, with its options. Raises one UserError with all problems.

    For --help and the like, it is what prints that.
    """
    verbs, flags = [name for name in app if not name.startswith("-")], {*app.help_flags, *app.version_flags}
    if verbs and words and words[0] not in {*app, *flags}:
        raise UserError(unknown_key("command line", words[0], verbs, "command", "see --help"))
    problems, required = Problems(), dict[str, str]()
    end = words.index("--") if "--" in words else len(words)
    # DeepSpeed's launcher gives each rank its number; the environment says it, too.
    words, rest = [word for word in words[:end] if not word.startswith("--local_rank=")], words[end:]
    if not flags & {*words} and (words or not verbs):
        verb, apps, words = app.parse_commands(words)
        of_command = apps[-1].assemble_argument_collection(default_parameter=AS_FIELDS)
        known = {name: argument for argument in of_command for name in argument.names if name.startswith("-")}
        # The words after an unknown option are its values, or the positional ones that would be missing.
        are_known = all(word.partition("=")[0] in known for word in words if word.startswith("--"))
        fields = [argument.field_info for argument in of_command if argument.required and not argument.children]
        required = {
            field.name: field.name.upper() if field.is_positional else f"--{field.name}"
            for field in fields
            if are_known or not field.is_positional
        }
        words = [*verb, *_each_once(words, known, problems)]
    try:
        command, given, _ = app.parse_args([*words, *rest], exit_on_error=False, print_error=False)
    except UserError as error:  # of a class of options
        problems += [f"command line: {problem}" for problem in error.problems]
    except CycloptsError as error:
        problems += _sentences(error, required)
    problems.refuse()
    return lambda: command(*given.args, **given.kwargs)


def _sentences(error: CycloptsError, required: dict[str, str]) -> list[str]:
    """What cyclopts, or pydantic for it, has found.

    Args:
        required: options of which it is said that they are missing, with their names in the help.
    """
    if isinstance(error.__cause__, ValidationError):
        found = [one for one in error.__cause__.errors() if one["type"] != "missing" or one["loc"][0] in required]
        return sentences(found, "command line", [])
    if isinstance(error, MissingArgumentError) and error.keyword:
        return [f'command line: {error.keyword} has no value; give one, after "=" where it begins with "-".']
    if isinstance(error, MissingArgumentError):  # nothing is given at all
        return [f"command line: {name} is missing; add it, see --help." for name in required.values()]
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return [f"command line: {shown(error.unused_tokens[0])} belongs to no option; see --help."]
    error.verbose = False
    return [f"command line: {str(error).strip().rstrip('.')}; see --help."]


def _each_once(words: list[str], known: dict[str, Argument], problems: Problems) -> list[str]:
    """`words` without unknown options and repeated ones, which are among the `problems` unless the values are equal."""
    kept, given = [], dict[str, list[str]]()
    place = 0
    while place < len(words):
        option, has_value, value = words[place].partition("=")
        start, place = place, place + 1
        if not option.startswith("--"):
            kept.append(words[start])
            continue
        count, is_list = known[option].token_count() if option in known else (0, True)
        while not has_value and place < len(words) and not words[place].startswith("--"):
            if not is_list and place - start > count:
                break
            place += 1
        values = [value] if has_value else words[start + 1 : place] or ["true"]
        if option not in known:
            problems.append(unknown_key("command line", option, known, "option", "see --help"))
        elif given.setdefault(option, values) != values:
            first, last = " ".join(given[option]), " ".join(values)
            problems.append(f"{option} is given twice, as {first} and as {last}; keep one.")
        elif given[option] is values:
            kept += words[start:place]
    return kept


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
