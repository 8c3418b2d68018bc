"""Where alerts go: a command or an http(s) URL, which may hold a secret."""

from __future__ import annotations

import os
import re
import shlex
import shutil

HIDDEN = "/***"
_REMEDY = "give a command, an http(s) URL, or '$NAME' of a variable that holds one."


def parse_target(target: str) -> str | list[str]:
    """A URL, or the words of a command, which is run without a shell. $NAME is taken from the environment, so that a
    secret stands on no command line. Raises ValueError."""
    text = os.path.expandvars(target) if target.startswith("$") else target
    if re.match(r"https?://[^/\s]+", text):
        if text.endswith(HIDDEN):
            raise ValueError(f"{target} is what a record keeps of a URL; give all of it, or '$NAME' of a variable.")
        return text
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{target} is no command ({error}); {_REMEDY}") from None
    if not words or not shutil.which(words[0]):
        raise ValueError(f"{words[0] if words else repr(text)} is no program on this host; {_REMEDY}")
    return words


def without_secrets(text: str) -> str:
    """Of each http(s) URL in it the host alone."""
    return re.sub(r"(https?://)(?:[^/?#@\s]*@)?([^/?#\s'\"]+)[/?#][^\s'\"]*", rf"\1\2{HIDDEN}", text)
