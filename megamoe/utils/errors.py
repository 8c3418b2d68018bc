"""Errors for users: sentences that name the value, the limit and the remedy, all of a configuration at once."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any


class UserError(Exception):
    """Something the user can fix. `problems` holds one sentence each; programs print them and exit with code 2."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class PeerError(UserError):
    """Another rank, host or store is late, lost or out of reach, which a restart can cure: exit code 1."""


class Problems(list[str]):
    """Problems of one configuration, collected so that all are reported at once."""

    def attempt(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`; where it raises UserError, its problems are kept and None comes back. A
        PeerError ends the checks: it is no problem of the configuration."""
        try:
            return function(*args)
        except PeerError:
            raise
        except UserError as error:
            self.extend(error.problems)

    def refuse(self) -> None:
        """Raise one UserError with all of them, if there are any."""
        if self:
            raise UserError(*self)


class _Missing(AttributeError):
    pass


class SoundFields(SimpleNamespace):
    """The fields of a configuration that are right by themselves."""

    def __getattr__(self, name: str) -> Any:
        raise _Missing(name)


def broken_rules(rules: Iterable[Callable[[Any], Iterable[str]]], fields: Any) -> list[str]:
    """What the rules say of `fields`. A rule that needs one that `SoundFields` does not have is passed over."""
    problems: list[str] = []
    for rule in rules:
        with contextlib.suppress(_Missing):
            for problem in rule(fields):
                problems.append(problem)
    return problems


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def shown(value: Any, limit: int = 100) -> str:
    """`value` as JSON writes it, in one line that can be printed and of about `limit` characters at most."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else f"{text[:limit]}..."


def unknown_key(
    where: str,
    key: str,
    known: Iterable[str],
    kind: str = "key",
    remedy: str = "it has no effect here, so leave it out",
) -> str:
    """Say that `key` is unknown in `where`, with the nearest known one where there is one.

    Args:
        kind: what it is called.
        remedy: what to do where the nearest one is not meant.
    """
    near = difflib.get_close_matches(key[:100], list(known), n=1, cutoff=0.5)
    return f"{where}: unknown {kind} {shown(key)}" + (
        f'; did you mean "{near[0]}"? If not, {remedy}.'
        if near
        else f"; {remedy}; known {kind}s are {', '.join(sorted(known))}."
    )
