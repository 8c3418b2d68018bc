"""Where alerts go: a command or an http(s) URL, which may hold a secret."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
from typing import Annotated

from pydantic import AfterValidator, PlainSerializer

HIDDEN = "/***"


def parse_target(target: str) -> str | list[str]:
    """A URL, or the words of a command, which is run without a shell. $NAME is taken from the environment, so that a
    secret stands on no command line. Raises ValueError."""
    text = os.path.expandvars(target) if target.startswith("$") else target
    if re.match(r"https?://[^/\s]+", text) and not text.endswith(HIDDEN):  # what a record keeps of one
        return text
    words: list[str] = []
    with contextlib.suppress(ValueError):  # a quote without its end
        words = shlex.split(text)
    if not words or not shutil.which(words[0]):
        raise ValueError(f"{target!r} is no program here and no whole URL; give one, or '$NAME' of a variable with it.")
    return words


def without_secrets(text: str) -> str:
    """Of each http(s) URL in it the host alone."""
    text = re.sub(r"(https?://)[^/?#@\s'\"]*@", r"\1", text)
    return re.sub(r"(https?://[^/?#\s'\"]+)[/?#][^\s'\"]*", rf"\1{HIDDEN}", text)


def _check(target: str) -> str:
    parse_target(target)
    return target


AlertTarget = Annotated[str, AfterValidator(_check), PlainSerializer(without_secrets)]
