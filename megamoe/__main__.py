"""The one command: `megamoe VERB`, the same as `python -m megamoe VERB`."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from megamoe import __version__
from megamoe.config import cli
from megamoe.utils.interrupts import on_interrupt
from megamoe.utils.quiet import quiet_deepspeed

# What each does, and an example; its module is imported when it is called.
VERBS = {
    "prepare": ("turn text into tokens", "megamoe prepare my_texts/ --out data/mine --vocab_size 16384"),
    "plan": (
        "predict memory, traffic and time of a run",
        "megamoe plan --gpus 64 --preset moonlight-16b-a3b --ep_size 8 --ds_config ds_configs/zero2.json",
    ),
    "generate": (
        "continue prompts with a trained model",
        'megamoe generate runs/mine --prompt "In a quiet library," --temperature 0.8',
    ),
    "evaluate": ("measure a model on texts, or on tasks", "megamoe evaluate runs/mine data/plays --json plays.json"),
    "convert": ("write a model in the form of another program", "megamoe convert runs/mine model.gguf --dtype fp16"),
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
        "megamoe preflight hostfile HOSTFILE -- --ds_config ds_configs/zero2.json",
    ),
}


def make_app() -> cli.App:
    app = cli.make_app(
        "megamoe", version=__version__, help="Pretrain Mixture-of-Experts language models with DeepSpeed."
    )
    for verb, (help, example) in VERBS.items():
        app.command(f"megamoe.commands.{verb}:{verb}", name=verb, help=f"{help}\n\n  {example}")
    app.register_install_completion_command()
    return app


def main(*verb: str) -> NoReturn:
    """Run the command line of this process, of `verb` where one is given, and exit."""
    on_interrupt(signal.SIG_DFL)  # while the command is loaded
    words = [*verb, *sys.argv[1:]]
    if "--verbose" not in words:
        quiet_deepspeed()
    cli.run(lambda: run(words))


def run(words: list[str]) -> None:
    command = cli.parse(make_app(), words)
    on_interrupt(signal.default_int_handler)
    command()


if __name__ == "__main__":
    main()
