"""What a run is: its checked inputs, what it resumes from, its folder and its record."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import megamoe
from megamoe.checkpoint import folders
from megamoe.checkpoint.opening import open_source
from megamoe.config.model import ModelConfig
from megamoe.config.precision import Precision, resolve
from megamoe.config.recipe import DTYPES, batch_sizes, deepspeed_problems, dtype_of
from megamoe.config.run import HeldOutSource, RunConfig
from megamoe.config.run_checks import length_problems, run_problems
from megamoe.config.schedule import read_schedule
from megamoe.data.batches import BatchShape, TrainData
from megamoe.data.ledger import DataLedger, read_ledger
from megamoe.data.ramp import BatchRamp
from megamoe.data.token_files import TokenCorpus, corpus_prefix
from megamoe.data.tokenizer import load_tokenizer, numbering_problems
from megamoe.evaluation.held_out import Evaluator, HeldOut, tokens_per_byte
from megamoe.evaluation.tasks import TaskEvaluator, Tasks, load_tasks
from megamoe.formats.config_json import differences, find_preset, preset_of
from megamoe.formats.source_checks import model_problems
from megamoe.launch.watch import Position
from megamoe.model.compiled import compiler_problems
from megamoe.model.costs import parameter_count
from megamoe.model.grouped_gemm import DESCRIPTIONS, kernel_for
from megamoe.model.placement import placement_problems
from megamoe.resume_rules import decisive, new_schedule, part, remedy, stages_of
from megamoe.training.engine import deepspeed_own_problems
from megamoe.utils.errors import Problems, UserError
from megamoe.utils.json_files import read_json
from megamoe.utils.run_folder import RunFolder


class Job:
    """Everything about a run that can be checked before anything is built or written."""

    def __init__(
        self, run: RunConfig, world_size: int, device: torch.device, precision: Precision, leads: bool = True,
        scans: bool = True,
    ):  # fmt: skip
        """
        Args:
            precision: says what "auto" in the DeepSpeed JSON stands for.
            leads: this rank locks the run folder, and checks what the run resumes or starts from, for all ranks.
            scans: this rank checks the tokens of the corpora, for all ranks of its host.

        Raises one UserError with all problems.
        """
        self.run, self.device, self.precision = run, device, precision
        self.run_dir = run.folder
        problems = Problems()
        self.folder: RunFolder | None = problems.attempt(RunFolder, run.folder, run.auto_resume) if leads else None
        # Checkpoints to resume from, and where there are none, weights to start from; in the order to try them.
        self.candidates: list[Path] = []
        self.initial_weights: list[Path] = []
        self.is_resuming = False
        self.ledger = DataLedger()  # as the leading rank has it
        if self.folder:
            self.ledger = problems.attempt(read_ledger, run.folder) or self.ledger
            self._find_start(self.folder)
            problems += self._folder_problems(self.folder)
        self.written_ds: dict[str, Any] = problems.attempt(read_json, Path(run.ds_config))
        self.ds = self.written_ds and resolve(self.written_ds, precision.choice)
        if self.ds is not None:
            problems += deepspeed_problems(self.ds, run.ds_config, world_size, device.type == "cpu")
            problems += length_problems(run, self.ds)
        self.model: ModelConfig = problems.attempt(find_preset, run.preset)
        if self.model:
            problems += self._initial_problems()
            problems += run_problems(run, self.model, self.ds or {}, world_size)
            problems += placement_problems(self.model, run.ep_size, dtype_of(self.ds or {}), world_size, run.preset)
            self._open_corpora(problems, leads, scans)
            self.loaded_tasks = problems.attempt(self._load_tasks) if leads and run.lm_eval_tasks else None
        if (run.lm_eval_interval or run.lm_eval_folder) and not run.lm_eval_tasks:
            problems.append("lm_eval_interval and lm_eval_folder are of tasks, and none is given; add --lm_eval_tasks.")
        both = {source.name for source in run.valid_data} & set(run.lm_eval_tasks)
        problems += [f"a held-out set and a task have the name {name}; write NAME=PATH with another." for name in both]
        if run.compile:
            problems += compiler_problems(device)
        if not problems:
            problems += deepspeed_own_problems(self.ds, run.ds_config)
        problems.refuse()

        self.schedule = read_schedule(self.ds, run.ds_config)
        stages = stages_of(run.model_dump())
        self.shape = BatchShape(*batch_sizes(self.ds, world_size), world_size, self.seq_len, stages)
        self.data = TrainData(self.corpora, [source.weight for source in run.data], run.seed)
        self.run_id = self.folder.run_id() if self.folder else None
        self.new_schedule: dict[str, Any] | None = None  # that the run resumes with
        self.reduces_in_fp32_now = False  # gradients, and did not when it began
        self.ema_decay_before: float | None = None  # of the run that is resumed
        self.changes_ramp_at: int | None = None  # the first step that resumes with another number of samples
        if self.folder and self.folder.began is not None:
            last = self.folder.last_record()
            self._check_same_run(self.folder.began, last)
            self.ema_decay_before = last.get("run", {}).get("ema_decay")

    def _find_start(self, folder: RunFolder) -> None:
        run = self.run
        self.is_resuming = run.resume or (run.auto_resume and folder.began is not None)
        found = folders.run_checkpoints(folder.checkpoints, self.ledger) if self.is_resuming else []
        if any(map(folders.is_complete, found)):
            self.candidates = found
        elif run.init_from:
            self.initial_weights = folders.found_at(Path(run.init_from))

    @property
    def claims_to_be_done(self) -> bool:
        """Whether a checkpoint has the name of the last step, or of a later one; its bytes are not looked at."""
        saved = filter(folders.is_complete, self.candidates)
        return any((folders.step_of(path) or 0) >= self.last_step for path in saved)

    @property
    def last_step(self) -> int:
        last = self.run.steps or self.schedule.total_steps
        assert last, "length_problems"
        return last

    @property
    def seq_len(self) -> int:
        return self.run.seq_len or self.model.max_position_embeddings

    def _open_corpora(self, problems: Problems, leads: bool, scans: bool) -> None:
        """Open training and held-out corpora; what is wrong with them is added to `problems`."""

        def corpus(path: str, split: str) -> TokenCorpus:
            prefix = corpus_prefix(path, split)
            return problems.attempt(TokenCorpus, prefix, self.seq_len, self.model.vocab_size, scans)

        run = self.run
        self.corpora = [corpus(source.path, "train") for source in run.data]
        has_held_out = (Path(run.data[0].path) / "valid.idx").is_file()
        own = [HeldOutSource(name="valid", path=run.data[0].path)] if has_held_out else []
        self.valid_sources = run.valid_data or own
        held_out = [corpus(source.path, "valid") for source in self.valid_sources]
        wrong = self._tokenizer_problems()
        problems += wrong

        def density(corpus: TokenCorpus) -> float | None:
            if not corpus or wrong or not leads:  # which alone reports it
                return None
            return problems.attempt(tokens_per_byte, corpus, run.eval_samples)

        names = [source.name for source in self.valid_sources]
        self.valid = [HeldOut(name, one, density(one)) for name, one in zip(names, held_out, strict=True)]

    def _load_tasks(self) -> Tasks:
        if not self.tokenizer:
            raise UserError(
                f"lm_eval_tasks need a tokenizer, but {self.run.data[0].path} has no tokenizer.json; put it there."
            )
        length = self.model.max_position_embeddings
        return load_tasks(self.run.lm_eval_tasks, self.run.lm_eval_folder, load_tokenizer(self.tokenizer), length)

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
        """Corpora of a mix, and the held-out ones, must have been made with one tokenizer that fits the model, where it
        is known."""
        places = [Path(source.path) for source in self.run.data]
        places += [corpus_prefix(source.path, "valid").parent for source in self.valid_sources]
        files = list(dict.fromkeys(file for place in places if (file := place / "tokenizer.json").exists()))
        # And number tokens as that of the directory whose weights the run starts from.
        theirs = [path / "tokenizer.json" for path in self.initial_weights if (path / "tokenizer.json").is_file()]
        problems = Problems(numbering_problems(files[0], theirs[0]) if files and theirs else [])
        if all([problems.attempt(load_tokenizer, file, self.model.vocab_size) for file in files]):
            problems += [
                f"{files[0]} and {path} differ, so a token id means two things; prepare both corpora with one "
                "--tokenizer."
                for path in files[1:]
                if path.read_bytes() != files[0].read_bytes()
            ]
        return problems

    def _folder_problems(self, folder: RunFolder) -> list[str]:
        run, run_dir = self.run, self.run_dir
        if run.resume and folder.began is None:
            return [f"{run_dir} holds no run to resume; check --run_dir or leave --resume out."]
        if run.resume and not self.candidates:
            return [
                f"{run_dir} holds no complete checkpoint to resume from; give --auto_resume alone, which then begins "
                "at step 0, or choose another --run_dir."
            ]
        if folder.began is not None and not self.is_resuming:
            return [f"{run_dir} holds another run; choose another --run_dir, or continue it with --resume."]
        if folder.is_foreign():
            return [f"{run_dir} exists already and holds no run; choose another --run_dir."]
        files = [parent for parent in run_dir.parents if parent.exists() and not parent.is_dir()]
        return [f"{run_dir} cannot be made, since {file} is a file; choose another --run_dir." for file in files]

    def _check_same_run(self, began: dict[str, Any], last: dict[str, Any]) -> None:
        """Raises UserError if the run that `began` so, and had the record `last`, would have other losses."""
        started_from, init_from = began.get("run", {}).get("init_from"), self.run.init_from
        # Once there is a checkpoint it may be left out.
        if started_from != init_from and (init_from or not self.candidates):
            raise UserError(
                f"{self.run_dir} was started with init_from {json.dumps(started_from)}, not {json.dumps(init_from)}; "
                "give the same again, or choose another --run_dir."
            )
        before, now = decisive(last), decisive(self.record())
        # A run that began when the shipped JSONs did not say it goes on with what they say now.
        key = "communication_data_type"
        if before["optimization"][key] is None and now["optimization"][key] == "fp32":
            before["optimization"][key] = "fp32"
            self.reduces_in_fp32_now = True
        changed = [key for key in now if before.get(key) != now[key]]
        if self.run.resume and "optimization" in changed:
            others = part(now["optimization"], before["optimization"])
            if others.keys() <= {"scheduler"}:  # a longer run, or another decay: the optimizer's state fits still
                self.new_schedule = new_schedule(now["optimization"]["scheduler"], before["optimization"]["scheduler"])
                changed.remove("optimization")
        problems = [
            f"{self.run_dir} holds a run with {key} {json.dumps(part(before.get(key), now[key]))}, "
            f"not {json.dumps(part(now[key], before.get(key)))}; {remedy(key, before, now)}."
            for key in changed
        ]
        problems += self._ramp_problems(BatchRamp(self.shape.samples, stages_of(last.get("run", {}))))
        if problems:
            raise UserError(*problems)

    def _ramp_problems(self, before: BatchRamp) -> list[str]:
        """A changed ramp is for steps that no checkpoint has taken yet, and on --resume."""
        step = before.first_difference(self.shape.ramp)
        if step is None:
            return []
        taken = max((folders.step_of(path) or 0 for path in self.candidates), default=0)
        taken = self.ledger.data_step(taken + 1) - 1  # steps of data, after the run has gone back
        if self.run.resume and step > taken:
            self.changes_ramp_at = step
            return []
        way = f"give --resume to change step {step}" if step > taken else "resume with the same for those"
        return [
            f"{self.run_dir} holds a run with {before.samples_of(step)} samples in step {step} of its batch_ramp, not "
            f"{self.shape.ramp.samples_of(step)}, and {taken} steps are taken; {way}, or choose another --run_dir."
        ]

    def record(self) -> dict[str, Any]:
        """The resolved configuration and the versions: enough to repeat the run."""
        packages = ("torch", "deepspeed", "tokenizers", "numpy")
        return {
            "run_id": self.run_id,
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

    def describe(self, first: int) -> str:
        """The run from step `first` on, in one line."""
        run, shape = self.run, self.shape
        return (
            f"{run.preset}: {parameter_count(self.model):,} parameters, {dtype_of(self.ds)}"
            f"{', compiled' * run.compile}{', deterministic' * run.deterministic}, "
            f"{shape.world_size} rank{'s' * (shape.world_size > 1)}, ep_size {run.ep_size}; {self._describe_batch()}; "
            f"{self.describe_corpora()}; {self._describe_held_out()}; steps {first} to {self.last_step}; "
            f"run folder {self.run_dir}"
        )

    def _describe_batch(self) -> str:
        shape = self.shape
        ramp = [f"{samples} x {shape.seq_len} up to step {last}, then " for samples, last in shape.stages]
        return f"{''.join(ramp)}{shape.samples} x {shape.seq_len} tokens per step"

    def describe_initial(self) -> str | None:
        """By what the model differs from that of the directory whose weights the run starts from, where the weights do
        not show it."""
        directory = next((path for path in self.initial_weights if (path / "config.json").is_file()), None)
        if directory is None:
            return None
        theirs = preset_of(directory)
        changed = [
            f"{name} {json.dumps(getattr(self.model, name))} in place of {json.dumps(getattr(theirs, name))}"
            for name in differences(self.model, theirs)
        ]
        return f"the model has, for the weights in {directory}, {', '.join(changed)}" if changed else None

    def describe_precision(self) -> str | None:
        """What the precision is and why, where the device has a say in it."""
        return self.precision.describe(self.written_ds, self.run.ds_config)

    def describe_products(self) -> str | None:
        """What multiplies rows with their experts' weights on this device, where it is not the fastest way."""
        kernel = kernel_for(self.device, DTYPES[dtype_of(self.ds)])
        return None if kernel == "grouped_mm" else f"the experts' products are {DESCRIPTIONS[kernel]}"

    def describe_split_dependence(self) -> str | None:
        """What makes the losses depend on how a step is split over ranks and micro-batches, if anything does."""
        if self.model.router_aux_loss_coef and self.model.router_aux_loss_type == "micro_batch":
            return (
                'router_aux_loss_type is "micro_batch": the losses depend on how a step is split over ranks and '
                'micro-batches; "sequence" and "global_batch" do not'
            )
        return None

    def describe_corpora(self) -> str:
        """Tokens and place of each corpus and, in a mix, its weight."""
        mixed = len(self.corpora) > 1
        return ", ".join(
            f"{corpus.num_tokens:,} tokens in {source.path}" + (f" at weight {source.weight:g}" if mixed else "")
            for corpus, source in zip(self.corpora, self.run.data, strict=True)
        )

    def _describe_held_out(self) -> str:
        if not self.valid:
            return "no held-out tokens, so nothing is evaluated (--valid_data gives some)"
        several = len(self.valid) > 1
        return ", ".join(
            f"{one.corpus.num_tokens:,} held-out tokens in {source.path}" + (f" ({one.name})" if several else "")
            for one, source in zip(self.valid, self.valid_sources, strict=True)
        )

    @property
    def tokenizer(self) -> Path | None:
        path = Path(self.run.data[0].path) / "tokenizer.json"
        return path if path.is_file() else None

    def _tokenizer_digest(self) -> str | None:
        return hashlib.sha256(self.tokenizer.read_bytes()).hexdigest() if self.tokenizer else None

    def enter_folder(self, first: int, checkpoint: Path | None) -> None:
        """Record the start, or the resume from `checkpoint`, in the run folder. On rank 0."""
        assert self.folder
        self.folder.enter(
            {"step": first, "checkpoint": checkpoint and checkpoint.name, **self.record()}, self.tokenizer
        )

    def tasks(self, position: Position) -> TaskEvaluator | None:
        """Of lm-evaluation-harness; rank 0 alone has loaded them."""
        return TaskEvaluator(self.loaded_tasks, position.at) if self.run.lm_eval_tasks else None

    def evaluator(self) -> Evaluator | None:
        return Evaluator(self.valid, self.run.eval_samples) if self.valid else None
