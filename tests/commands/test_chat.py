"""A terminal chat: what is typed is continued, with the text so far as context."""

import io

import pytest
import torch
from exported import export, random_decoder
from refusals import has, refusal
from toy import PRESET

import megamoe
from megamoe.commands import chat as command
from megamoe.commands.options import Chat
from megamoe.config.model import ModelConfig
from megamoe.data.tokenizer import END_OF_TEXT, train_tokenizer

LIMIT = 40
LONG = "0123456789" * 9  # a token each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export with random weights."""
    made = tmp_path_factory.mktemp("chat")
    train_tokenizer(["to be or not to be"], 270).save(str(made / "tokenizer.json"))
    config = ModelConfig(**{**PRESET, "vocab_size": 300, "max_position_embeddings": LIMIT})
    return export(random_decoder(config), made / "hf", made / "tokenizer.json")


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """Types lines; returns what is printed."""

    def talk(*lines, **options):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        command.chat(Chat(model=folder, max_new_tokens=8, **options))
        return capsys.readouterr().out

    return talk


def test_each_line_is_continued_as_by_generate_with_all_of_the_text_so_far(folder, talk):
    model, tokenizer = megamoe.load_model(folder), megamoe.load_tokenizer(folder)
    sampling = {"temperature": 1.3, "top_k": 50, "top_p": 0.9}
    so_far, expected = "", ""
    for seed, line in ((7, "to be"), (8, "or not")):
        so_far += ("\n" if so_far else "") + line
        (text,) = megamoe.generate(model, tokenizer, [so_far], 8, seed=seed, **sampling)
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # of a character of which the last byte has not come
        so_far, expected = so_far + text, f"{expected}{text}\n"
    assert talk("to be", "or not", seed=7, **sampling) == expected


@pytest.mark.parametrize(
    ("typed", "said", "printed", "contexts"),
    [
        (["to be", "", "or not"], ["naïve 😀"], "naïve 😀\n", ["to be"]),  # characters of several tokens each
        (["to be", "not"], [" or^C", " that"], " or\n that\n", ["to be", "to be or\nnot"]),
        (["to be", "be"], [f" or{END_OF_TEXT}not", ""], " or [end of text]\n\n", ["to be", "be"]),
        ([LONG, "x"], ["", ""], "\n\n", [LONG[8 - LIMIT :], f"{LONG}\nx"[8 - LIMIT :]]),
    ],
    ids=["an empty line ends", "Ctrl-C ends a continuation", "a text ends", "a long text loses its beginning"],
)
def test_what_is_printed_and_what_the_model_is_given(folder, talk, monkeypatch, typed, said, printed, contexts):
    tokenizer, given, left = megamoe.load_tokenizer(folder), [], iter(said)

    def stream(model, prompts, count, **_):
        given.append(tokenizer.decode(prompts[0]))
        text = next(left)
        for token in tokenizer.encode(text.removesuffix("^C")).ids:
            yield torch.tensor([token])
        if text.endswith("^C"):
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "stream", stream)
    assert (talk(*typed), given) == (printed, contexts)


def test_a_continuation_that_leaves_no_room_is_refused(folder):
    problem = refusal(command.chat, Chat(model=folder, max_new_tokens=LIMIT))
    has(problem, f"max_new_tokens is {LIMIT}", f"max_position_embeddings of {LIMIT}", "lower it")
