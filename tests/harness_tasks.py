"""Tasks of lm-evaluation-harness with data of their own, on this disk, and a model of transformers to evaluate."""

import json
from pathlib import Path

import torch
from exported import Weights, random_decoder
from tokenizers import processors

import megamoe
from megamoe.data.tokenizer import train_tokenizer
from megamoe.formats.export import native_class, write_huggingface

DATA = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
"""
ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
FEW_SHOTS = """\
output_type: loglikelihood
num_fewshot: 1
fewshot_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: perplexity}]
"""
ANSWER = """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5}
metric_list: [{metric: exact_match}]
"""
WORDS = [
    "to", "be", "or", "not", "that", "is", "the", "question", "sleep", "dream", "ay",
    "there", "s", "rub", "fair", "Ophelia", "arms", "sea", "of", "troubles",
]  # fmt: skip
QUESTIONS = [
    {
        "question": " ".join(WORDS[number : number + 1 + number % 5]),
        "choices": [f" {WORDS[(number * step) % len(WORDS)]}{' the' * (step % 3)}" for step in (3, 5, 7)],
        "answer": number % 3,
    }
    for number in range(11)
]


def write_task(folder: Path, name: str, kind: str, rows: list[dict]) -> None:
    """`folder`/NAME.yaml, of one of the kinds above, with its data."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(DATA.format(name=name, data=data, cache=folder / "cache") + kind)


def write_small_glm(folder: Path, texts: list[str], window: int, first: str | None = None):
    """`folder`/hf, a directory of transformers' GLM, and `folder`/tokenizer.json; returns its decoder and tokenizer,
    which puts the token `first` before a text."""
    tokenizer = train_tokenizer(texts, 290)
    if first:
        tokenizer.add_special_tokens([first])
        special = [(first, tokenizer.token_to_id(first))]
        tokenizer.post_processor = processors.TemplateProcessing(single=[first, "$A"], special_tokens=special)
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    config = megamoe.load_preset(
        "tiny-glm", vocab_size=300, hidden_size=32, num_hidden_layers=2, max_position_embeddings=window, head_dim=16,
        intermediate_size=48, moe_intermediate_size=16,
    )  # fmt: skip
    decoder = random_decoder(config)
    source = Weights(decoder)
    architecture, _ = native_class(source, config)
    write_huggingface(source, folder / "hf", torch.float32, 10**9, config, file, architecture=architecture)
    return decoder, tokenizer
