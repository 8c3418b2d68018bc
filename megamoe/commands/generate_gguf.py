"""Continue prompts with llama.cpp: `python tools/generate_gguf.py model.gguf --prompt "In a quiet library,"`.

Takes the files of `convert_checkpoint.py`, or any other that llama.cpp reads. Needs the package xllamacpp.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megamoe.config import cli
from megamoe.model.generation import sampling_problems
from megamoe.utils.errors import Problems, UserError


def check(args: argparse.Namespace) -> argparse.Namespace:
    problems = Problems(sampling_problems(args.temperature, None, None))
    if args.max_new_tokens < 1:
        problems.append(f"max_new_tokens is {args.max_new_tokens}; it must be at least 1.")
    problems.refuse()
    return args


def main() -> None:
    parser = cli.Parser(description="Continue prompts with llama.cpp.")
    parser.add_argument("file", type=Path, help="a .gguf file")
    parser.add_argument("--prompt", nargs="+", default=["In a quiet library,"], help="one or more texts to continue")
    parser.add_argument("--max_new_tokens", type=int, default=120, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token each time")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    args = parser.parse(check=check)
    if not args.file.is_file():
        raise UserError(f"{args.file} is no file; give a .gguf of tools/convert_checkpoint.py.")
    try:
        import xllamacpp
    except ModuleNotFoundError:
        raise UserError("llama.cpp is in the package xllamacpp, which is missing; pip install xllamacpp.") from None
    params = xllamacpp.CommonParams()
    params.model.path, params.warmup, params.verbosity = str(args.file), False, 0
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"llama.cpp cannot read {args.file} ({error}); convert the model again.") from None
    options = {"max_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    for number, prompt in enumerate(args.prompt, start=1):
        answer = server.handle_completions({"prompt": prompt, **options})
        if "error" in answer:
            why = answer["error"].get("message", answer["error"])
            raise UserError(f"llama.cpp does not continue the prompt ({why}); give a shorter one, or fewer new tokens.")
        text = answer["choices"][0]["text"]
        print(f"[sample {number}] prompt: {prompt}\n{prompt}{text}\n{'-' * 40}")
