"""The one command: `megamoe VERB`, the same as `python -m megamoe VERB`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from megamoe import __version__
from megamoe.utils.interrupts import on_interrupt
from megamoe.utils.quiet import quiet_deepspeed

if TYPE_CHECKING:  # what takes a while to import waits for `main`, so that Ctrl-C shows no stack trace
    from megamoe.config.cli import App

# What each does, and an example.
VERBS = {
    "prepare": ("turn text into tokens", "megamoe prepare my_texts/ --out data/mine --vocab_size 16384"),
    "plan": (
        "predict memory, traffic and time of a run",
        "megamoe plan --gpus 64 --preset moonlight-16b-a3b --ep_size 8 --ds_config zero2",
    ),
    "doctor": ("check what this host lacks for a run", "megamoe doctor --preset small --run_dir runs/mine"),
    "train": ("train a model with the GPUs of this host, or on its CPU", "megamoe train --text my.txt"),
    "status": ("say what a run is doing, or where it ended and how to go on", "megamoe status runs/mine"),
    "generate": (
        "continue prompts with a trained model",
        'megamoe generate runs/mine --prompt "In a quiet library," --temperature 0.8',
    ),
    "chat": ("continue what you type, in a terminal", "megamoe chat runs/mine --temperature 0.8"),
    "evaluate": ("measure a model on texts, or on tasks", "megamoe evaluate runs/mine my_texts/ --json mine.json"),
    "convert": ("write a model in the form of another program", "megamoe convert runs/mine hf_mine"),
    "inspect": ("show what a checkpoint holds, and whether it is damaged", "megamoe inspect runs/mine"),
    "upcycle": (
        "make a Mixture-of-Experts model of a dense one",
        "megamoe upcycle dense_model/ sparse_model/ --experts 8 --top_k 2",
    ),
    "report": ("print and draw what runs have done", "megamoe report runs/mine"),
    "reshard": ("fit a checkpoint to any number of ranks in advance", "megamoe reshard runs/mine runs/resharded"),
    "check": ("check token files once, so that no run has to", "megamoe check data/mine data/theirs.bin"),
    "preflight": (
        "check the hosts of a job before ranks are started on them",
        "megamoe preflight hostfile HOSTFILE -- --ds_config zero2",
    ),
}


def make_app() -> App:
    from megamoe.config import cli

    app = cli.make_app(
        "megamoe",
        version=__version__,
        help="Pretrain Mixture-of-Experts language models with DeepSpeed. To begin, with a text of 1 MB or so:\n\n"
        "  megamoe train --text my.txt",
        help_epilogue="megamoe COMMAND --help shows the options of a command.",
    )
    for place, (verb, (help, example)) in enumerate(VERBS.items()):
        app.command(command_of(verb), name=verb, help=f"{help}\n\n  {example}", sort_key=place, help_epilogue="")
    app.register_install_completion_command(name="--install_completion")
    return app


def command_of(verb: str) -> Callable[..., None] | str:
    """The function of a verb, whose module is imported when its options are known: from `commands/options.py`, or else
    from that module."""
    from megamoe.commands import options

    module = f"megamoe.commands.{verb}"
    of_verb = getattr(options, verb.capitalize(), None)
    if of_verb is None:
        return f"{module}:{verb}"

    def command(options: Any) -> None:
        getattr(import_module(module), verb)(options)

    command.__annotations__["options"] = of_verb
    if not any(field.is_required() for field in of_verb.model_fields.values()):
        command.__defaults__ = (of_verb(),)
    return command


def main(*verb: str) -> NoReturn:
    """Run the command line of this process, of `verb` where one is given, and exit."""
    on_interrupt(signal.SIG_DFL)  # while the command is loaded
    words = [*verb, *sys.argv[1:]]
    if "--verbose" not in words:
        quiet_deepspeed()
    from megamoe.config import cli

    cli.run(lambda: run(words))


def run(words: list[str]) -> None:
    from megamoe.config import cli

    command = cli.parse(make_app(), words)
    on_interrupt(signal.default_int_handler)
    command()


if __name__ == "__main__":
    main()
