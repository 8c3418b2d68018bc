"""megamoe evaluate: numbers of each document and of all, as transformers' logits give them, at any number of ranks."""

import json
import math
import re
import sys

import pytest
import torch
from corpora import write_corpus
from harness_tasks import ANSWER, CHOICE, QUESTIONS, write_small_glm, write_task
from ranks import DEADLINE, run_alone, start_processes
from refusals import has, only, refusals
from transformers import AutoModelForCausalLM

import megamoe
from megamoe.__main__ import run
from megamoe.commands import evaluate
from megamoe.config import cli

WINDOW = 24
TEXTS = {
    "a.txt": "To sleep, perchance to dream — naïve, aye: there's the rub.\n" * 3,
    "b.txt": "To be!",
    "c.txt": "".join(f"{number} slings and arrows; " for number in range(9)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory of transformers' GLM, texts, and the corpus that is prepared of them."""
    folder = tmp_path_factory.mktemp("evaluate")
    _, tokenizer = write_small_glm(folder, list(TEXTS.values()), WINDOW)
    (folder / "texts").mkdir()
    for name, text in TEXTS.items():
        (folder / "texts" / name).write_text(text)
    write_corpus([("train", text) for text in TEXTS.values()], tokenizer, folder / "corpus")
    write_task(folder, "choice", CHOICE, QUESTIONS)
    return folder


def run_here(words, said):
    """What the tool exits with on this rank, which prints to the file `said`."""
    with open(said, "w") as sys.stdout:
        sys.stderr = sys.stdout
        try:
            cli.run(lambda: run(["evaluate", *map(str, words)]))
        except SystemExit as end:
            return end.code


def run_ranks(ranks, folder, *words):
    """The numbers that the tool writes, started on that number of ranks, and what rank 0 prints."""
    out, said = folder / f"{ranks}.json", folder / "said"
    words = [folder / "hf", folder / "texts", *words, "--json", out]
    if ranks == 1:
        assert run_alone(run_here, words, said) == 0
    else:
        processes = start_processes(ranks, run_here, words, said)
        for process in processes:
            process.join(DEADLINE)
            assert process.exitcode == 0
    return json.loads(out.read_text()), said.read_text()


@torch.no_grad()
def by_transformers(folder, stride):
    """Nats and tokens of each document, from the logits of one window at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    sums = []
    for text in TEXTS.values():
        stream = [0, *megamoe.load_tokenizer(folder / "tokenizer.json").encode(text).ids]
        nats, done = 0.0, 0
        while done < len(stream) - 1:
            start = max(done + stride - WINDOW, 0) if done else 0
            end = min(start + WINDOW, len(stream) - 1)
            rows = model(torch.tensor([stream[start:end]])).logits[0].double().log_softmax(-1)
            nats -= sum(rows[place - start, stream[place + 1]].item() for place in range(done, end))
            done = end
        sums.append((nats, len(stream) - 1))
    return sums


def check_documents(folder, of_set, stride):
    sums = by_transformers(folder, stride)
    for one, (name, text), (nats, tokens) in zip(of_set["documents"], TEXTS.items(), sums, strict=True):
        assert (one["name"], one["tokens"]) == (str(folder / "texts" / name), tokens)
        assert one["bytes"] == len(text.encode())
        assert one["loss"] == pytest.approx(nats / tokens, rel=1e-6)
        assert one["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-6)
    nats, tokens = (sum(part) for part in zip(*sums, strict=True))
    assert (of_set["tokens"], of_set["loss"]) == (tokens, pytest.approx(nats / tokens, rel=1e-6))


def test_every_documents_numbers_are_those_of_transformers_logits(folder):
    words = (folder / "corpus" / "train", "--tasks", "choice", "--task_folder", folder)
    found, said = run_ranks(1, folder, *words)
    of_texts, of_corpus = found["sets"].values()
    check_documents(folder, of_texts, WINDOW)
    assert of_corpus["bits_per_byte"] == pytest.approx(of_texts["bits_per_byte"], rel=1e-9)
    assert found["tasks"].keys() == {"choice_acc", "choice_acc_norm"}
    has(said, f"choice_acc: {found['tasks']['choice_acc']:.4f}")
    last, _ = [line for line in said.splitlines() if "in all" in line]
    assert re.fullmatch(rf" *{of_texts['loss']:.4f} .* {of_texts['tokens']} .*/texts in all: 3 documents", last)


def test_ranks_and_overlapping_windows_give_transformers_numbers_too(folder):
    found, said = run_ranks(2, folder, "--stride", 7, "--batch_size", 2)
    check_documents(folder, found["sets"][str(folder / "texts")], 7)
    assert said.count("in all") == 1


def test_tasks_that_give_no_values_are_an_error(folder):
    write_task(folder, "broken", ANSWER.replace("max_gen_toks: 5", "max_gen_toks: many"), QUESTIONS)
    said = folder / "said_of_broken"
    code = run_alone(run_here, [folder / "hf", "--tasks", "broken", "--task_folder", folder], said)
    assert code == 2
    has(said.read_text(), "warning: the tasks have failed", f"error: {evaluate.NO_TASK_VALUES}")


def test_with_ranks_each_of_them_gets_the_same_command_line(folder, run, monkeypatch):
    given = []
    monkeypatch.setattr(evaluate, "run_ranks", lambda *started: given.append(started) or 75)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "megamoe", "evaluate", "hf", "--ranks", "2"])
    assert run("evaluate", folder / "hf", folder / "texts", "--ranks", 2)[0] == 75
    assert given == [(["-m", "megamoe", "evaluate", "hf", "--ranks", "2"], 2)]


def test_problems_come_together(folder, call):
    def refused(*texts, model="hf", **options):
        options = evaluate.Evaluate(model=folder / model, texts=texts, **options)
        return refusals(evaluate.Inputs, options, True)

    hf, texts = folder / "hf", folder / "texts"
    problems = refused("absent", hf / "model.safetensors", tasks=["x"], task_folder="nowhere")
    for problem, part in zip(problems, ("absent does", "UTF-8", "nowhere is no"), strict=True):
        has(problem, part)
    has(only(refused(texts, stride=WINDOW + 1)), "--stride is 25", "lower it")
    has(only(refused(texts, model="none")), str(folder / "none"), "does not exist")
    has(only(refusals(call, "evaluate", hf)), "a TEXT, or --tasks")
    has(only(refusals(call, "evaluate", hf, texts, "--task_folder", "x")), "--task_folder", "add --tasks")
    has(only(refusals(call, "evaluate", hf, texts, "--json", folder)), "json", "is no file", "give the path of one")
