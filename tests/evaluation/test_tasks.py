"""Held-out sets and tasks during a run: on all ranks, with the experts split between them, and without an export."""

import shutil
import sys

import pytest
import torch
from corpora import write_corpus
from harness_tasks import ANSWER, CHOICE, QUESTIONS, ROLLING, WORDS, write_task
from ranks import run_ranks
from refusals import has, only, refusal, refusals
from toy import check, ds_config, train_here, write_inputs

import megamoe
from megamoe.checkpoint.opening import find_checkpoint, open_model, open_source
from megamoe.config.run import parse_run
from megamoe.data.tokenizer import train_tokenizer
from megamoe.formats.export import write_huggingface

TEXTS = [f"To be, or not to be: that is question {number}; to sleep, perchance to dream.\n" * 9 for number in range(8)]
# Not the texts above: where two windows of a document hold the same tokens, the harness's adapter (0.4.13) takes one's
# logits for the other, at the wrong positions.
UNLIKE = " ".join(f"{word} {number}" for number in range(7) for word in WORDS[number::2])
KINDS = {"rolling": ROLLING, "choice": CHOICE, "answer": ANSWER}


def write_all(folder):
    """The fields of a run with two held-out sets and three tasks."""
    run = write_inputs(folder, ds_config(2), {"vocab_size": 300, "max_position_embeddings": 48})
    shutil.rmtree(folder / "corpus")
    tokenizer = train_tokenizer(TEXTS, 290)
    write_corpus([("train", text) for text in TEXTS], tokenizer, folder / "corpus")
    for name, some in (("plays", TEXTS[:3]), ("code", TEXTS[2:])):
        write_corpus([("train", "to"), *(("valid", text) for text in some)], tokenizer, folder / name)
    (folder / "tasks").mkdir()
    for name, kind in KINDS.items():
        write_task(folder / "tasks", name, kind, [{"text": UNLIKE}] if kind == ROLLING else QUESTIONS)
    return {
        **run, "run_dir": str(folder / "run"), "steps": 3, "eval_interval": 2, "seq_len": 24,
        "valid_data": [str(folder / "plays"), f"source={folder / 'code'}"],
        "lm_eval_tasks": list(KINDS), "lm_eval_folder": str(folder / "tasks"), "lm_eval_interval": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run on two ranks that share the experts, and its log."""
    folder = tmp_path_factory.mktemp("tasks")
    log, _ = run_ranks(2, train_here, {**write_all(folder), "ep_size": 2})
    return folder, log["valid"]


@pytest.fixture
def inputs(tmp_path):
    return write_all(tmp_path)


def test_every_set_and_task_is_logged_at_its_own_interval(done):
    _, valid = done
    sets = {"loss", "tokens", "bits_per_byte", "source_loss", "source_bits_per_byte"}
    tasks = {"rolling_bits_per_byte", "choice_acc", "choice_acc_norm", "answer_exact_match"}
    assert [row["step"] for row in valid] == [1, 2, 3]
    assert [row.keys() - {"step"} for row in valid] == [tasks, sets | tasks, sets | tasks]


def test_the_sets_of_a_run_are_as_evaluate_finds_them(done):
    folder, valid = done
    model, tokenizer = megamoe.load_model(folder / "run"), megamoe.load_tokenizer(folder / "run")
    for key, some in (("loss", TEXTS[:3]), ("source_loss", TEXTS[2:])):
        stream = [token for text in some for token in (*tokenizer.encode(text).ids, 0)]
        samples = torch.tensor(stream)[: (len(stream) - 1) // 24 * 24 + 1]
        logits = model(samples[:-1].view(-1, 24)).flatten(0, 1)
        assert valid[-1][key] == pytest.approx(torch.nn.functional.cross_entropy(logits, samples[1:]).item(), rel=1e-6)


def test_the_live_model_scores_as_the_harness_scores_its_export(done, tmp_path, module_cache):
    import lm_eval  # takes seconds
    from lm_eval.tasks import TaskManager

    folder, valid = done
    source, config = open_source(find_checkpoint(folder / "run")), open_model(folder / "run").config
    write_huggingface(source, tmp_path / "hf", torch.float32, 10**9, config, folder / "corpus" / "tokenizer.json")
    found = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(tmp_path / "hf"), "trust_remote_code": True}, tasks=list(KINDS), batch_size=3,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False), device="cpu",
        bootstrap_iters=0,
    )["results"]  # fmt: skip
    for value in ("rolling_bits_per_byte", "choice_acc", "choice_acc_norm", "answer_exact_match"):
        task, _, metric = value.partition("_")
        assert valid[-1][value] == pytest.approx(found[task][f"{metric},none"], rel=1e-5), value


def test_what_keeps_tasks_from_being_evaluated_is_said_before_the_run(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("megamoe.evaluation.lm_eval_model.TaskManager", own_tasks_only)
    monkeypatch.chdir(tmp_path)  # where `datasets` looks through all folders for the data of the broken task
    (tmp_path / "tasks" / "broken.yaml").write_text("task: broken\ndataset_path: json\ntest_split: test\n")
    said = refusal(check, {**inputs, "lm_eval_tasks": ["broken"]})
    has(said, "task broken of lm-evaluation-harness cannot be loaded")
    has(refusal(check, {**inputs, "lm_eval_folder": "nowhere"}), "nowhere is no folder of tasks")
    own = f"rolling={tmp_path / 'code'}"
    has(refusal(check, {**inputs, "valid_data": [own]}), "have the name rolling")
    has(refusal(check, {**inputs, "lm_eval_tasks": []}), "lm_eval_interval and lm_eval_folder", "--lm_eval_tasks")
    said = refusals(check, {**inputs, "lm_eval_tasks": ["chioce", "rolling", "zzzzzz"]})
    has(said[0], 'knows no task "chioce"', 'did you mean "choice"?')
    has(said[1], 'knows no task "zzzzzz"', "lm-eval ls tasks")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "megamoe.evaluation.lm_eval_model")
    has(refusal(check, inputs), "need the package lm_eval", "pip install")
    (tmp_path / "corpus" / "tokenizer.json").unlink()
    has(refusal(check, inputs), "lm_eval_tasks is ", "no tokenizer.json")


def own_tasks_only(include_path=None, include_defaults=True):
    """The harness's thousands take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=False)


def test_the_corpora_of_all_sets_are_checked_at_once(inputs, tmp_path):
    inputs = {name: value for name, value in inputs.items() if not name.startswith("lm_eval")}
    train_tokenizer(TEXTS, 280).save(str(tmp_path / "plays" / "tokenizer.json"))
    train_tokenizer(TEXTS, 285).save(str(tmp_path / "code" / "tokenizer.json"))
    for number, name in enumerate(("plays", "code")):
        has(refusals(check, inputs)[number], str(tmp_path / name / "tokenizer.json"), "differ")
    said = refusals(check, {**inputs, "valid_data": ["a=nowhere", f"b={tmp_path / 'code'}", "elsewhere"]})
    assert len(said) == 3
    has(" ".join(said), "nowhere.bin", "elsewhere.bin", str(tmp_path / "code" / "tokenizer.json"))


def test_a_set_has_its_own_name_or_that_of_its_folder_and_names_that_the_log_cannot_tell_apart_are_refused():
    words = ["a/plays", "b/code/valid.bin", "x=a/b", "y=c=d", "./a=b/c", "b/a d"]
    run = parse_run(["--ds_config", "ds.json", "--valid_data", *words])
    assert [(source.name, source.path) for source in run.valid_data] == [
        ("plays", "a/plays"), ("code", "b/code/valid.bin"), ("x", "a/b"), ("y", "c=d"), ("c", "./a=b/c"),
        ("a_d", "b/a d"),
    ]  # fmt: skip
    for words, part in (
        (["x=a", "b/x"], "have the name x"),
        (["ema=a"], "ema"),
        (["ema_x=a"], "ema_x"),
        (["a b=c"], "pattern"),
    ):
        has(only(refusals(parse_run, ["--ds_config", "ds.json", "--valid_data", *words])), "valid_data", part)
