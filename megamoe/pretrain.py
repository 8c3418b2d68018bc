"""Pretrain a model: `deepspeed --num_gpus 8 megamoe/pretrain.py --ds_config ds_configs/zero2.json`.

Parse, check everything at once, build, train, close. `--help` lists the options; each is a field of RunConfig.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megamoe
from megamoe import cli, manifest
from megamoe.checkpoint import CheckpointWriter
from megamoe.config import ModelConfig, Problems, RunConfig, UserError, load_preset, read_json, validate
from megamoe.data import TokenCorpus, TrainData, corpus_counts, corpus_prefix
from megamoe.ds_config import batch_sizes, deepspeed_problems, dtype_of, read_schedule, run_problems
from megamoe.engine import build_engine, deepspeed_own_problems, init_distributed
from megamoe.metrics import Sinks
from megamoe.model import Decoder
from megamoe.plan import parameter_count
from megamoe.reader import model_problems, open_source
from megamoe.restore import restore_first_that_holds
from megamoe.router import LoadBalancer
from megamoe.stopping import STOPPED, Deadline, StopRequest
from megamoe.train import BatchShape, Evaluator, Trainer
from megamoe.watch import Position, Watch

# A run may go on only with what decides its losses unchanged. Ranks, ep_size, ZeRO stage and the split of a step's
# samples over ranks and micro-batches do not.
SAME_ON_RESUME = ("model", "optimization", "seed", "seq_len", "samples_per_step", "data", "tokenizer_sha256")
OPTIMIZATION = (
    "optimizer", "scheduler", "gradient_clipping", "bf16", "fp16", "data_types", "communication_data_type",
    "prescale_gradients", "gradient_predivide_factor",
)  # fmt: skip


def parse_run(words: list[str] | None = None) -> RunConfig:
    """The command line as a RunConfig. Raises UserError."""
    parser = cli.Parser(prog="pretrain.py", description="Pretrain a Mixture-of-Experts decoder with DeepSpeed.")
    default = [corpus.path for corpus in RunConfig.model_fields["data"].default]
    cli.add_fields(parser, RunConfig, data={"nargs": "+", "metavar": "PATH[=WEIGHT]", "default": default})
    parser.add_argument("--local_rank", help="given by the launcher; not used")
    values = vars(parser.parse(words))
    values.pop("local_rank")
    given = {name: value for name, value in values.items() if value is not None}
    return validate(RunConfig, given, "command line")


class Job:
    """Everything about a run that can be checked before anything is built or written."""

    def __init__(self, run: RunConfig, world_size: int, device: torch.device):
        """Raises one UserError with all problems."""
        problems = Problems()
        self.run = run
        self.run_dir = run.folder
        self.resuming = run.resume or (run.auto_resume and (self.run_dir / "run.json").is_file())
        problems += self._folder_problems()
        self.ds: dict[str, Any] = problems.attempt(read_json, Path(run.ds_config))
        if self.ds is not None:
            problems += deepspeed_problems(self.ds, run.ds_config, world_size, device.type == "cpu")
        self.model: ModelConfig = problems.attempt(load_preset, run.preset)
        # Checkpoints to go on from, and where there are none, weights to start from, in the order in which to try them.
        self.candidates = manifest.candidates(self.run_dir / "checkpoints") if self.resuming else []
        self.initial_weights: list[Path] = []
        if run.init_from and not self.candidates:
            self.initial_weights = manifest.found_at(Path(run.init_from))
        if self.model:
            problems += self._initial_problems()
            problems += run_problems(run, self.model, self.ds or {}, world_size)
            seq_len = run.seq_len or self.model.max_position_embeddings

            def corpus(path: str, split: str) -> TokenCorpus:
                return problems.attempt(TokenCorpus, corpus_prefix(path, split), seq_len, self.model.vocab_size)

            self.corpora = [corpus(source.path, "train") for source in run.data]
            held_out = (Path(run.data[0].path) / "valid.idx").is_file()
            self.valid_path = run.valid_data or (run.data[0].path if held_out else None)
            self.valid = corpus(self.valid_path, "valid") if self.valid_path else None
            problems += self._tokenizer_problems()
        if not problems:
            problems += deepspeed_own_problems(self.ds, run.ds_config)
        problems.refuse()

        self.schedule = read_schedule(self.ds, run.ds_config)
        self.shape = BatchShape(*batch_sizes(self.ds, world_size), world_size, seq_len)
        self.data = TrainData(self.corpora, [source.weight for source in run.data], run.seed)
        if self.resuming:
            self._check_same_run(read_json(self.run_dir / "run.json"))
        newest = manifest.step_of(self.candidates[0]) if self.candidates else 0
        self.is_done = newest >= self.last_step
        if self.is_done and not run.auto_resume:
            raise UserError(
                f"{self.run_dir} is at step {newest} already and the run ends at {self.last_step}; "
                "give a larger --steps."
            )

    def _initial_problems(self) -> list[str]:
        """What keeps the weights to start from, or the newest of them that can be opened, from being this model's."""
        problems: list[str] = []
        for path in self.initial_weights:
            try:
                return model_problems(open_source(path), self.model, str(path))
            except UserError as error:
                problems = error.problems
        return problems

    def _tokenizer_problems(self) -> list[str]:
        """Corpora of a mix, and the held-out one, must have been made with one tokenizer, where it is known."""
        paths = [source.path for source in self.run.data] + [self.valid_path or ""]
        files = [path for path in (Path(path) / "tokenizer.json" for path in paths) if path.is_file()]
        return [
            f"{files[0]} and {path} differ, so a token id means two things; prepare both corpora with one --tokenizer."
            for path in dict.fromkeys(files)
            if path.read_bytes() != files[0].read_bytes()
        ]

    def _folder_problems(self) -> list[str]:
        holds_run = (self.run_dir / "run.json").is_file()
        if self.run.resume and not holds_run:
            return [f"{self.run_dir} holds no run to resume; check --run_dir or leave --resume out."]
        if holds_run and not self.resuming:
            return [f"{self.run_dir} holds another run; choose another --run_dir, or go on with --resume."]
        if not holds_run and self.run_dir.exists() and (not self.run_dir.is_dir() or any(self.run_dir.iterdir())):
            return [f"{self.run_dir} is there already and holds no run; choose another --run_dir."]
        files = [parent for parent in self.run_dir.parents if parent.exists() and not parent.is_dir()]
        return [f"{self.run_dir} cannot be made, for {file} is a file; choose another --run_dir." for file in files]

    def _check_same_run(self, record: dict[str, Any]) -> None:
        """Raises UserError if the run that left `record` would have other losses."""
        started_from, init_from = record.get("run", {}).get("init_from"), self.run.init_from
        # Once there is a checkpoint it may be left out.
        if started_from != init_from and (init_from or not self.candidates):
            raise UserError(
                f"{self.run_dir} was started with init_from {json.dumps(started_from)}, not {json.dumps(init_from)}; "
                "give the same again, or choose another --run_dir."
            )
        before, now = _decisive(record), _decisive(self.record())
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise UserError(
                *(
                    f"{self.run_dir} holds a run with {key} {json.dumps(_part(before.get(key), now[key]))}, "
                    f"not {json.dumps(_part(now[key], before.get(key)))}; {_remedy(key, before)}."
                    for key in changed
                )
            )

    @property
    def last_step(self) -> int:
        return self.run.steps or self.schedule.total_num_steps

    def record(self) -> dict[str, Any]:
        """The resolved configuration and the versions: enough to repeat the run."""
        packages = ("torch", "deepspeed", "tokenizers", "numpy")
        return {
            "command": sys.argv,
            "preset": self.run.preset,
            "parameters": parameter_count(self.model),
            "model": self.model.model_dump(),
            "run": self.run.model_dump(),
            "seed": self.run.seed,
            "seq_len": self.shape.seq_len,
            "samples_per_step": self.shape.samples,
            "world_size": self.shape.world_size,
            "ep_size": self.run.ep_size,
            "data": [
                {"path": str(corpus.prefix), "tokens": corpus.num_tokens, "weight": source.weight}
                for corpus, source in zip(self.corpora, self.run.data, strict=True)
            ],
            "tokenizer_sha256": self._tokenizer_digest(),
            "deepspeed": self.ds,
            "versions": {
                "megamoe": megamoe.__version__,
                "python": platform.python_version(),
                **{package: version(package) for package in packages},
            },
        }

    def corpus_words(self) -> str:
        """The corpora in words: tokens, place and, in a mix, weight."""
        mixed = len(self.corpora) > 1
        return ", ".join(
            f"{corpus.num_tokens:,} tokens in {source.path}" + (f" at weight {source.weight:g}" if mixed else "")
            for corpus, source in zip(self.corpora, self.run.data, strict=True)
        )

    @property
    def tokenizer(self) -> Path | None:
        path = Path(self.run.data[0].path) / "tokenizer.json"
        return path if path.is_file() else None

    def _tokenizer_digest(self) -> str | None:
        return hashlib.sha256(self.tokenizer.read_bytes()).hexdigest() if self.tokenizer else None

    def open_folder(self, first_step: int) -> Sinks:
        """Create the run folder, with run.json and the tokenizer, and open the sinks. On rank 0."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.tokenizer:
            shutil.copyfile(self.tokenizer, self.run_dir / "tokenizer.json")
        partial = self.run_dir / "run.json.partial"
        partial.write_text(json.dumps(self.record(), indent=2) + "\n")
        os.replace(partial, self.run_dir / "run.json")
        return Sinks(self.run_dir, first_step)

    def evaluator(self) -> Evaluator | None:
        if self.valid is None:
            return None
        counts = corpus_counts(self.valid_path or "")
        ratio = counts["valid"]["tokens"] / counts["valid"]["bytes"] if counts else None
        return Evaluator(self.valid, self.run.eval_samples, ratio)


def _decisive(record: dict[str, Any]) -> dict[str, Any]:
    """Of a run's record, what decides its losses. Where a corpus lies does not."""
    optimization = {key: record.get("deepspeed", {}).get(key) for key in OPTIMIZATION}
    data = [{key: corpus.get(key) for key in ("tokens", "weight")} for corpus in record.get("data", [])]
    return {key: {**record, "optimization": optimization, "data": data}.get(key) for key in SAME_ON_RESUME}


def _remedy(key: str, before: dict[str, Any]) -> str:
    if key == "samples_per_step":
        return (
            f'set "train_batch_size" to {before.get(key)} in the DeepSpeed JSON and leave '
            '"gradient_accumulation_steps" out, so that any number of ranks shares them'
        )
    return "resume with the same, or choose another --run_dir"


def _part(value: Any, other: Any) -> Any:
    """Of an object, what differs from `other`; of anything else, all."""
    if not isinstance(value, dict) or not isinstance(other, dict):
        return value
    return {key: _part(inner, other.get(key)) for key, inner in value.items() if inner != other.get(key)}


def agree(problems: list[str], rank: int) -> None:
    """Share the problems of all ranks; if there are any, rank 0 prints them all and every rank exits with code 2."""
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, problems)
    distinct = list(dict.fromkeys(problem for one in everywhere for problem in one))
    if not distinct:
        return
    if rank == 0:
        for problem in distinct:
            print(f"error: {problem}", file=sys.stderr, flush=True)
    dist.barrier()  # or the launcher could end rank 0 before it has spoken
    sys.exit(2)


def prepare(rank: int, world_size: int, device: torch.device) -> Job:
    """Parse and check; problems of any rank end all of them together."""
    job, problems = None, []
    try:
        job = Job(parse_run(), world_size, device)
    except UserError as error:
        problems = error.problems
    agree(problems, rank)
    assert job
    return job


def restore(job: Job, engine: Any, first_expert: int) -> int:
    """Give the engine what the run starts from, if that is not drawn; returns the steps that are done. Collective."""
    checkpoint = restore_first_that_holds(engine, job.candidates, first_expert)
    if checkpoint:
        return manifest.step_of(checkpoint)
    restore_first_that_holds(engine, job.initial_weights, first_expert, weights_only=True)
    return 0


def train(job: Job, rank: int, position: Position, stop: StopRequest) -> bool:
    """Build the engine, restore a checkpoint where there is one, and train. Returns whether the last step was reached.

    Args:
        position: learns where this rank is.
        stop: asks for an end before the last step.
    """
    run, model_config = job.run, job.model
    position.at("building the engine")
    # DeepSpeed's expert-parallel groups are consecutive ranks.
    ep_rank = rank % run.ep_size
    model = Decoder(model_config, run.seed, run.ep_size, ep_rank, run.recompute_blocks)
    engine = build_engine(model, job.ds, job.schedule)
    position.at("restoring")
    first, problems = 0, []
    try:
        first = restore(job, engine, ep_rank * (model_config.num_local_experts // run.ep_size))
    except UserError as error:
        problems = error.problems
    agree(problems, rank)
    sinks = job.open_folder(first) if rank == 0 else None
    if rank == 0:
        shape = job.shape
        print(
            f"{run.preset}: {parameter_count(model_config):,} parameters, {dtype_of(job.ds)}, "
            f"{shape.world_size} ranks, ep_size {run.ep_size}; {shape.samples} x {shape.seq_len} tokens a step; "
            f"{job.corpus_words()}; steps {first} to {job.last_step}; "
            f"run folder {job.run_dir}",
            flush=True,
        )
    balancer = LoadBalancer(
        model.routers(), model_config.router_bias_rate, model_config.router_bias_rule, model_config.router_load_decay
    )
    writer = CheckpointWriter(
        engine,
        job.run_dir / "checkpoints",
        job.record(),
        keep_last=run.keep_last,
        keep_every=run.keep_every,
        background=not run.foreground_save,
        first=first,
        waiting=lambda: position.at("saving"),
    )
    deadline = Deadline(run.time_limit, os.environ)
    trainer = Trainer(
        engine, balancer, job.data, job.evaluator(), sinks, job.shape, writer, position, stop, deadline, seed=run.seed
    )
    try:
        return trainer.run(first, job.last_step, run.log_interval, run.eval_interval, run.save_interval)
    finally:
        writer.close()
        if sinks:
            sinks.close()


def stopped_code() -> int:
    """Exit code of a run that leaves early. torchrun would take any but 0 for a failure, and start the ranks again; its
    launch script gives a file for a note, and then ends with `STOPPED` itself."""
    note = os.environ.get("MEGAMOE_STOP_NOTE")
    if note is None:
        return STOPPED
    Path(note).touch()
    return 0


def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        parse_run()
    # The reader of our lines, a launcher or an ssh connection, may go while the ranks still have to save.
    sys.stdout, sys.stderr = cli.Console(sys.stdout), cli.Console(sys.stderr)
    meeting, device = init_distributed()
    stop = StopRequest()  # until here a signal ends the process at once
    position = Position()
    watch = Watch(meeting, position)
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)  # a rank that ends without it can abort at exit
        stack.callback(watch.close)
        try:
            job = prepare(meeting.seat.rank, meeting.seat.world_size, device)
            watch.collective_seconds = job.run.collective_timeout
            finished = job.is_done or train(job, meeting.seat.rank, position, stop)
            if job.is_done and meeting.seat.rank == 0:
                print(f"{job.run_dir} is at its last step, {job.last_step}, already", flush=True)
            code = 0 if finished else stopped_code()
        except SystemExit as end:  # on all ranks
            code = int(end.code or 0)
        except Exception as error:
            watch.explain(error)
            raise
    # Everything is written and closed. Without this, threads that libraries have left behind now and then abort the
    # process while it is taken down ("terminate called without an active exception"), and ranks would be slow enough to
    # be ended by a launcher that has seen the first one go.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    cli.run(main)
