"""Continue in a terminal what is typed. A model that was pretrained, and no more, answers nothing: it goes on with the
text so far, of which it sees the end that fits into its max_position_embeddings."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from megamoe.commands.models import load
from megamoe.commands.options import Chat
from megamoe.data.tokenizer import decode_continuation, encode, prefix_of
from megamoe.model.generation import stream
from megamoe.utils.errors import UserError


def chat(options: Chat) -> None:
    model, tokenizer, sampling = load(options)
    limit, prefix = model.config.max_position_embeddings, prefix_of(tokenizer)
    room = limit - options.max_new_tokens - len(prefix)
    if room < 1:
        raise UserError(
            f"max_new_tokens is {options.max_new_tokens}, which leaves no room for what you type in the model's "
            f"max_position_embeddings of {limit}; lower it."
        )
    so_far = ""
    for turn, line in enumerate(typed_lines()):
        so_far += "\n" * bool(so_far) + line
        ids, added, shown = prefix + encode(tokenizer, [so_far])[0][-room:], [], ""
        with contextlib.suppress(KeyboardInterrupt):  # which ends this continuation
            for chosen in stream(model, [ids], options.max_new_tokens, **sampling, seed=options.seed + turn):
                added += chosen.tolist()
                if added[-1] == sampling["end_of_text"]:
                    print(" [end of text]", end="")
                    so_far = shown = ""
                    break
                text = decode_continuation(tokenizer, ids, added)
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # of a character the first bytes alone
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
        print()
        so_far += shown


def typed_lines() -> Iterator[str]:
    """The lines of standard input, up to an empty one or its end (Ctrl-D in a terminal)."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 - lets `input` edit, and prints to what is no terminal

        print("Type a text to go on with. An empty line or Ctrl-D ends, Ctrl-C ends a continuation.")
    try:
        while line := input("> " if is_terminal else ""):
            yield line
    except EOFError:
        print("\n" * is_terminal, end="")
