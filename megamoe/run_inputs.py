"""What a run reads, opened and checked before anything is built: corpora, tokenizer, tasks, weights to start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.opening import open_source, tokenizer_of
from megamoe.config.model import ModelConfig
from megamoe.config.phases import Phases
from megamoe.config.precision import Precision
from megamoe.config.recipe import Recipe
from megamoe.config.run import HeldOutSource, RunConfig
from megamoe.data.batches import TrainData
from megamoe.data.cache import Cache
from megamoe.data.source import DataSource
from megamoe.data.sources import Location, locate, open_corpus
from megamoe.data.sources import open_source as open_data
from megamoe.data.token_files import TokenCorpus, corpus_prefix, has_split
from megamoe.data.tokenizer import end_of_text_of, load_tokenizer
from megamoe.evaluation.held_out import HeldOut, tokens_per_byte
from megamoe.evaluation.tasks import Tasks, load_tasks
from megamoe.formats.source_checks import model_problems
from megamoe.resume import Changes, Start
from megamoe.training.samples import Sampler, prompt_problems
from megamoe.utils.errors import Problems, UserError
from megamoe.utils.run_folder import TOKENIZER_FILES


@dataclass(frozen=True)
class RunInputs:
    """What a run reads."""

    sources: dict[tuple[str, int], DataSource]  # of training, by path and seq_len
    held_out: list[HeldOut]
    tokenizer: Path | None  # of the first corpus
    end_of_text: str | None  # the token that ends its documents; on the leading rank
    tokenizer_files: list[Path]  # for the run folder
    tasks: Tasks | None  # on the leading rank
    sampler: Sampler | None


@dataclass(frozen=True)
class Checked:
    """A run that can begin: what the checks have parsed and opened."""

    run: RunConfig
    model: ModelConfig
    recipe: Recipe
    precision: Precision
    device: torch.device
    last_step: int
    inputs: RunInputs
    data: TrainData
    start: Start
    changes: Changes = field(default_factory=Changes)  # of what it resumes
    record: dict[str, Any] = field(default_factory=dict)


def open_inputs(
    run: RunConfig,
    model: ModelConfig,
    seq_len: int,
    phases: Phases | None,
    initial_weights: list[Path],
    leads: bool,
    scans: bool,
) -> RunInputs:
    """Open and check what a run reads. Raises one UserError with all problems.

    Args:
        seq_len: of held-out samples, and of the others where there are no `phases`.
        initial_weights: that it starts from, in the order to try them.
        leads: this rank counts bytes, loads tasks and encodes prompts, for all ranks.
        scans: this rank checks the tokens of the corpora, for all ranks of its host.
    """
    problems = Problems(initial_problems(model, initial_weights))

    wanted = [(one.path, phase.seq_len) for phase in phases.all for one in phase.data] if phases else []
    wanted = wanted or [(one.path, seq_len) for one in run.data]
    found = locations(run, [*(path for path, _ in wanted), *(one.path for one in run.valid_data)])
    opened = {
        (path, length): problems.attempt(open_data, found[path], length, model.vocab_size, scans, run.packing)
        for path, length in dict.fromkeys(wanted)
    }
    first = found[wanted[0][0]].path
    own = [HeldOutSource(name="valid", path=wanted[0][0])] if problems.attempt(has_split, first, "valid") else []
    sources = run.valid_data or own
    held_out = [
        problems.attempt(open_corpus, found[one.path], "valid", seq_len, model.vocab_size, scans) for one in sources
    ]
    tokenized = [found[path].path for path, _ in opened]
    tokenized += [corpus_prefix(str(found[one.path].path), "valid").parent for one in sources]
    wrong = tokenizer_problems(tokenized, initial_weights, model.vocab_size)
    problems += wrong

    def density(corpus: TokenCorpus) -> Any:
        can_count = corpus and leads and not wrong
        return problems.attempt(tokens_per_byte, corpus, run.eval_samples) if can_count else None

    sets = [HeldOut(one.name, corpus, density(corpus)) for one, corpus in zip(sources, held_out, strict=True)]
    tokenizer = first / "tokenizer.json" if (first / "tokenizer.json").is_file() else None
    needing = {"lm_eval_tasks": ", ".join(run.lm_eval_tasks), "sample_interval": run.sample_interval}
    if not tokenizer:
        lack = "but the first corpus has no tokenizer.json; put it there."
        problems += [f"{option} is {value}, {lack}" for option, value in needing.items() if value]
    loaded = load_tokenizer(tokenizer) if tokenizer and leads and not wrong else None
    limit = model.max_position_embeddings
    tasks = None
    if loaded and run.lm_eval_tasks:
        tasks = problems.attempt(load_tasks, run.lm_eval_tasks, run.lm_eval_folder, loaded, limit)
    if loaded and run.sample_interval:
        problems += problems.attempt(prompt_problems, run.sample_prompts, loaded, limit) or []
    problems.refuse()
    sampler = Sampler(run.sample_prompts, run.sample_interval, run.seed, loaded) if run.sample_interval else None
    end_of_text = end_of_text_of(loaded) if loaded else None
    return RunInputs(opened, sets, tokenizer, end_of_text, tokenizer_files(tokenizer, initial_weights), tasks, sampler)


def tokenizer_files(tokenizer: Path | None, initial_weights: list[Path]) -> list[Path]:
    """What a run keeps of its tokenizer: the one of its corpus, and what the model that it starts from has next to its
    own, such as a chat template and the tokens to stop at."""
    own = [tokenizer_of(path).with_name(name) for path in initial_weights[:1] for name in TOKENIZER_FILES]
    files = {file.name: file for file in own if file.is_file()} | ({tokenizer.name: tokenizer} if tokenizer else {})
    return list(files.values())


def locations(run: RunConfig, paths: list[str]) -> dict[str, Location]:
    """Where the paths lie. Raises one UserError for all of them, or PeerError."""
    cache, problems = Cache(run.cache_dir, int(run.cache_gib * 2**30)), Problems()
    found = {path: problems.attempt(locate, path, cache) for path in dict.fromkeys(paths)}
    problems.refuse()
    return found


def initial_problems(model: ModelConfig, initial_weights: list[Path]) -> list[str]:
    """What keeps the weights to start from, or the newest of them that can be opened, from being this model's."""
    problems: list[str] = []
    for path in initial_weights:
        try:
            return model_problems(open_source(path), model, str(path))
        except UserError as error:
            problems = error.problems
    return problems


def tokenizer_problems(folders: list[Path], initial_weights: list[Path], vocab_size: int) -> list[str]:
    """Corpora of a mix, the held-out ones, and the directory whose weights the run starts from must number tokens
    alike, and the model must have all of them, where it is known."""
    found = [file for folder in folders if (file := folder / "tokenizer.json").exists()]
    theirs = [file for path in initial_weights if (file := path / "tokenizer.json").is_file()]
    files = list(dict.fromkeys([*found, *theirs[:1]])) if found else []
    problems = Problems()
    loaded = [problems.attempt(load_tokenizer, file, None if file in theirs else vocab_size) for file in files]
    if all(loaded):
        problems += [
            f"{files[0]} and {path} differ, so a token id means two things; prepare all corpora with one --tokenizer"
            f"{', that file' * (path in theirs)}."
            for path, tokenizer in zip(files, loaded, strict=True)
            if tokenizer.get_vocab() != loaded[0].get_vocab()
        ]
    return problems
