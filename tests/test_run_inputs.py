"""Corpora, tokenizers and weights that a run reads: what is refused before anything is built."""

import json
import shutil
from functools import partial
from pathlib import Path

import native_models
import pytest
import torch
from refusals import has, refusal, refusals
from tokenizers import Tokenizer, models
from toy import PRECISION, PRESET, check

from megamoe.config.run import RunConfig
from megamoe.pretrain import check_run

CPU = torch.device("cpu")


problem = partial(refusal, check)


def write_tokenizer(folder, size=96):
    vocabulary = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, size)}}
    Tokenizer(models.WordLevel(vocabulary)).save(str(folder / "tokenizer.json"))


def test_a_vocabulary_too_small_for_the_corpus_is_found_by_the_rank_that_reads_it(inputs, tmp_path):
    (tmp_path / "preset.json").write_text(json.dumps({**PRESET, "vocab_size": 50}))
    said = refusals(check_run, RunConfig(**inputs), 2, CPU, PRECISION, False, True)
    assert len(said) == 2  # training and held-out text
    has(said[0], "beyond the model's vocabulary of 50")
    others = check_run(RunConfig(**inputs), 2, CPU, PRECISION, False, False)
    assert [source.num_tokens for source in others.data.sources.values()] == [6000]


def test_corpora_of_two_tokenizers_are_not_mixed(inputs, tmp_path):
    shutil.copytree(tmp_path / "corpus", tmp_path / "other")
    mix = {**inputs, "data": [str(tmp_path / "corpus"), str(tmp_path / "other")]}
    for name in ("corpus", "other"):
        write_tokenizer(tmp_path / name)
    assert len(check(mix).data.sources) == 2
    write_tokenizer(tmp_path / "other", size=80)
    has(problem(mix), *(str(tmp_path / name / "tokenizer.json") for name in ("corpus", "other")))


def test_a_tokenizer_with_ids_beyond_the_model_or_that_is_none_is_refused(inputs, tmp_path):
    write_tokenizer(tmp_path / "corpus", size=97)
    has(problem(inputs), "tokenizer.json has token id 96, beyond the model's vocabulary of 96")
    (tmp_path / "corpus" / "tokenizer.json").write_text("{}")
    has(problem(inputs), "tokenizer.json cannot be read")


@pytest.fixture
def directory(tmp_path):
    """A directory of a class of transformers, whose vocabulary is the corpus's."""
    native_models.new_model("Glm4Moe").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_directory_is_the_preset_and_the_weights_of_a_run(inputs, directory):
    run = {**inputs, "preset": str(directory), "init_from": str(directory), "seq_len": 16}
    assert check(run).model.router_score == "sigmoid"
    assert check(run).start.initial_weights == [directory]
    has(problem({**run, "ep_size": 3}, 3), "the 8 experts")
    native_models.edit_config(directory, architectures=["GPT2LMHeadModel"])
    has(problem(run), "GPT2LMHeadModel")
    assert not Path(inputs["run_dir"]).exists()


def test_weights_of_another_tokenizer_than_the_corpus_are_refused(inputs, directory, tmp_path):
    run = {**inputs, "preset": str(directory), "init_from": str(directory), "seq_len": 16}
    write_tokenizer(directory)
    write_tokenizer(tmp_path / "corpus", 90)
    has(problem(run), "differ", "--tokenizer")
    write_tokenizer(tmp_path / "corpus")
    text = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(json.dumps(json.loads(text), indent=3))  # the same, written otherwise
    check(run)
