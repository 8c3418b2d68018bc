"""Samples while training: what the model makes of the user's prompts, on ranks that share the experts."""

import shutil

import pytest
from corpora import write_corpus
from ranks import run_ranks
from refusals import has, refusal, refusals
from toy import check, ds_config, losses, train_here, write_inputs

import megamoe
from megamoe.config.run import RunConfig
from megamoe.data.tokenizer import train_tokenizer

TEXT = "To be, or not to be: that is the question; to sleep, perchance to dream.\n" * 9
PROMPTS = ["To be", "naïve 😀 dream", "that is the"]  # of several lengths, and one more than a rank takes at a time
SEED = 7


def write_all(folder):
    run = write_inputs(folder, ds_config(1), {"vocab_size": 300, "max_position_embeddings": 40})
    shutil.rmtree(folder / "corpus")
    write_corpus([("train", TEXT), ("valid", TEXT)], train_tokenizer([TEXT], 290), folder / "corpus")
    return {**run, "run_dir": str(folder / "run"), "steps": 5, "ep_size": 2, "seed": SEED}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The options of a run, its log, and that of the run without samples."""
    folder = tmp_path_factory.mktemp("samples")
    options = write_all(folder)
    asked = {"sample_interval": 2, "sample_prompts": PROMPTS, "save_interval": 2}
    log, _ = run_ranks(2, train_here, {**options, **asked})
    without, _ = run_ranks(2, train_here, {**options, "run_dir": str(folder / "without")})
    return folder / "run", log, without


def test_samples_come_at_their_interval_and_after_the_last_step_and_change_no_loss(run):
    _, log, without = run
    assert [row["step"] for row in log["samples"]] == [2, 4, 5]
    assert without["samples"] == []
    assert losses(log) == losses(without)


def test_a_sample_is_that_of_generate_from_the_checkpoint_of_its_step(run):
    folder, log, _ = run
    tokenizer = megamoe.load_tokenizer(folder)
    room = 40 - max(len(tokenizer.encode(prompt).ids) for prompt in PROMPTS)
    for row in log["samples"]:
        model = megamoe.load_model(folder / "checkpoints" / f"step_{row['step']}")
        given = {"seed": SEED + row["step"], "temperature": 0.8}
        texts = [megamoe.generate(model, tokenizer, [prompt], room, **given)[0] for prompt in PROMPTS]
        pairs = zip(PROMPTS, texts, strict=True)
        assert row["samples"] == [{"prompt": prompt, "continuation": text} for prompt, text in pairs]


def test_prompts_may_be_the_lines_of_a_file(tmp_path):
    (tmp_path / "some.txt").write_text("ein Käse\n\n  und noch einer\n", encoding="utf-8")
    run = RunConfig(sample_interval=1, sample_prompts=["a word", str(tmp_path / "some.txt")])
    assert run.sample_prompts == ["a word", "ein Käse", "  und noch einer"]


def test_prompts_that_cannot_be_continued_are_refused_before_the_run(tmp_path):
    run = {**write_all(tmp_path), "ep_size": 1, "sample_interval": 1}
    (tmp_path / "empty.txt").write_text("\n")
    said = refusals(check, {**run, "sample_prompts": ["to be", TEXT, str(tmp_path / "empty.txt")]})
    has(said[0], "sample_prompts", "tokens; give 1 to 39", "max_position_embeddings of 40")
    has(said[1], 'sample_prompts: ""', "has 0 tokens")
    has(refusal(check, {**run, "sample_prompts": ["none.txt"]}), "none.txt", "No such file", "a prompt per line")
    has(refusal(check, {**run, "sample_prompts": ["x"], "sample_interval": 0}), "sample_interval is 0", "raise it")
    (tmp_path / "many.txt").write_text("a line\n" * 257)
    has(
        refusal(check, {**run, "sample_prompts": [str(tmp_path / "many.txt")]}),
        "sample_prompts has 257 texts",
        "256; give fewer",
    )
    (tmp_path / "corpus" / "tokenizer.json").unlink()
    has(refusal(check, run), "sample_interval is 1", "no tokenizer.json")
