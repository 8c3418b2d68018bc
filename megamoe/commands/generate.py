"""Sample from a trained model: `python tools/generate.py runs/tiny --prompt "In a quiet library,"`.

Takes a run (its newest checkpoint), a checkpoint, an export, or a directory of an open model. Several prompts are
continued in one batch. A run computes in the dtype that it trained in, or in fp32 where the processor is slow in that
one, so its text may differ from that of an export.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megamoe.checkpoint.opening import open_model, tokenizer_of
from megamoe.config import cli
from megamoe.config.precision import dtype_to_compute_in
from megamoe.data.tokenizer import decode_continuation, encode_prompts, end_of_text_id, load_tokenizer, tokenizer_file
from megamoe.formats.config_json import find_preset
from megamoe.model.generation import generate, sampling_problems
from megamoe.utils.errors import Problems


def check(args: argparse.Namespace) -> argparse.Namespace:
    problems = Problems(sampling_problems(args.temperature, args.top_k, args.top_p))
    for name in ("num_samples", "max_new_tokens"):
        if getattr(args, name) < 1:
            problems.append(f"{name} is {getattr(args, name)}; it must be at least 1.")
    problems.refuse()
    return args


def main() -> None:
    parser = cli.Parser(description="Continue prompts with a trained model.")
    parser.add_argument("model", type=Path, help="a run, a checkpoint, a Hugging Face directory, or a file")
    parser.add_argument("--preset", help="of weights that do not say what model they are of")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of a run with --ema_decay")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; by default the model's own")
    parser.add_argument("--end_of_text", metavar="TOKEN", help="token to stop at; by default the tokenizer's own")
    parser.add_argument("--prompt", nargs="+", default=["In a quiet library,"], help="one or more texts to continue")
    parser.add_argument("--num_samples", type=int, default=1, help="continuations of each prompt")
    parser.add_argument("--max_new_tokens", type=int, default=120, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token each time")
    parser.add_argument("--top_k", type=int, help="sample from the K most likely tokens only")
    parser.add_argument("--top_p", type=float, help="sample from the smallest set of this probability only")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    args = parser.parse(check=check)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_model(args.model, find_preset(args.preset) if args.preset else None, ema=args.ema)
    file = tokenizer_file(args.tokenizer or tokenizer_of(args.model))
    tokenizer = load_tokenizer(file, model.config.vocab_size)
    end_of_text = end_of_text_id(tokenizer, args.end_of_text)
    prompts = [prompt for prompt in args.prompt for _ in range(args.num_samples)]
    ids = encode_prompts(tokenizer, prompts)
    continuations = generate(
        model.load(dtype_to_compute_in(model.dtype, device), device),
        ids,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        end_of_text=end_of_text,
    )
    for number, (prompt, before, added) in enumerate(zip(prompts, ids, continuations, strict=True), start=1):
        text = decode_continuation(tokenizer, before, added)
        print(f"[sample {number}] prompt: {prompt}\n{prompt}{text}\n{'-' * 40}")
