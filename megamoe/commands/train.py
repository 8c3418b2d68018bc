"""Train on this host: start its ranks, each a process of pretrain.py. With --text, go from a text to samples."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from contextlib import nullcontext
from functools import partial
from glob import glob
from hashlib import sha256
from pathlib import Path

from pydantic import Field, model_validator

import megamoe
from megamoe.config.cli import Options
from megamoe.config.run import RunConfig
from megamoe.launch.codes import REFUSED, STOPPED
from megamoe.launch.local import default_ranks, run_ranks
from megamoe.monitoring import live
from megamoe.monitoring.alerts import Alerts
from megamoe.monitoring.ends import last_step, tell_failure
from megamoe.utils.errors import UserError

RANK = str(Path(megamoe.__file__).with_name("pretrain.py"))
# Of a run with --text, unless the user gives others.
PRESET, EVAL_INTERVAL, SAMPLES = "tiny-plus", 100, 5


class Start(Options):
    text: Path | None = Field(
        default=None,
        description="text file, folder or JSON lines to train on, in place of --data: it is prepared below data/, the "
        f"preset is {PRESET} and the run folder runs/NAME-DATE-TIME unless you give others, and samples are printed",
    )
    ranks: int | None = Field(
        default=None, ge=1, description="ranks to start; by default one per GPU, or two on a host without GPUs"
    )


class Train(RunConfig, Start):  # whose options come first
    @model_validator(mode="after")
    def _check_text(self) -> Train:
        if self.text and "data" in self.model_fields_set:
            raise UserError("text and data are given, and each says what to train on; leave one of them out.")
        return self


DEFAULTS = Train()


def train(options: Train = DEFAULTS) -> None:
    number = options.ranks or default_ranks()
    words = without(sys.argv[2:], "--ranks", "--text")
    if not options.text:
        if not options.model_fields_set & {"data", "data_schedule"} and not glob(f"{options.data[0].path}*"):
            raise UserError("there is nothing to train on; give a text by --text, or a prepared folder by --data.")
        sys.exit(run([RANK, *words], number, options, options.folder))
    preset = options.preset if "preset" in options.model_fields_set else PRESET
    data = prepare_text(options.text, preset)
    if options.dry_run:
        print(f"{data} stays, for the run: without --dry_run, the same command takes it", flush=True)
    run_dir = options.run_dir or f"runs/{name_of(options.text)}-{time.strftime('%Y%m%d-%H%M%S')}"
    interval = str(options.eval_interval if "eval_interval" in options.model_fields_set else EVAL_INTERVAL)
    own = {"preset": preset, "data": str(data), "run_dir": run_dir}
    own |= {"eval_interval": interval, "sample_interval": interval}
    for option, value in own.items():
        words += [] if option in options.model_fields_set else [f"--{option}", value]
    code = run([RANK, *words, "--auto_resume"], number, options, Path(run_dir))
    if code not in (0, REFUSED) and not options.dry_run and not live.is_wanted():  # whose last picture says so
        again = shlex.join(["megamoe", *sys.argv[1:], *([] if options.run_dir else ["--run_dir", run_dir])])
        print(f"to continue: {again}", file=sys.stderr)
    if code or options.dry_run:
        sys.exit(code)
    from megamoe.commands.generate import Generate, generate
    from megamoe.commands.report import Report, report

    generate(Generate(model=Path(run_dir), num_samples=SAMPLES))
    report(Report(runs=[Path(run_dir)]))


def run(words: list[str], number: int, options: Train, run_dir: Path) -> int:
    """Run the ranks, with the live view in a terminal, and tell of a death that none of them could tell of."""
    if options.dry_run:
        return run_ranks(words, number)
    code = run_ranks(words, number, partial(live.shown, run_dir) if live.is_wanted() else nullcontext)
    if code not in (0, REFUSED, STOPPED):
        alerts = Alerts(options.on_event, run_dir)
        tell_failure(alerts, run_dir, last_step(run_dir), f"the ranks exited with code {code}", code)
    return code


def without(words: list[str], *options: str) -> list[str]:
    """`words` without these options, each of one value."""
    kept, rest = [], iter(words)
    for word in rest:
        option, has_value, _ = word.partition("=")
        if option not in options:
            kept.append(word)
        elif not has_value:
            next(rest)
    return kept


def name_of(text: Path) -> str:
    return re.sub(r"[^\w.-]", "_", Path(os.path.abspath(text)).stem)


def prepare_text(text: Path, preset: str) -> Path:
    """The folder of the tokens of a text, by a tokenizer of its own: another one when the text has changed, so that a
    run goes on with what it has read."""
    from megamoe.commands.prepare import Prepare, prepare
    from megamoe.data.inputs import input_files
    from megamoe.formats.config_json import find_preset

    vocab_size = find_preset(preset).vocab_size
    files = [(file, file.stat()) for file in input_files(text.resolve())]
    described = json.dumps([[str(file), status.st_size, status.st_mtime_ns] for file, status in files])
    folder = Path("data") / f"{name_of(text)}-{vocab_size}"
    if folder.exists() and not is_made_of(folder, described):
        folder = folder.with_name(f"{folder.name}-{sha256(described.encode()).hexdigest()[:8]}")
    if not folder.exists():
        prepare(Prepare(inputs=[str(text)], out=folder, vocab_size=vocab_size))
        (folder / "text.json").write_text(described)
    return folder


def is_made_of(folder: Path, described: str) -> bool:
    file = folder / "text.json"  # a folder without it is the user's own
    return file.exists() and file.read_text() == described
