"""Sample from a trained run: `python tools/generate.py runs/tiny --prompt "In a quiet library,"`.

Several prompts are continued in one batch; the newest checkpoint of the run is used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megamoe import cli
from megamoe.checkpoint import folders
from megamoe.checkpoint.reader import find_checkpoint, load_weights, model_problems, open_source
from megamoe.config import ModelConfig, validate
from megamoe.data.tokenizer import encode, end_of_text_id, load_tokenizer, tokenizer_file
from megamoe.ds_config import DTYPES, dtype_of
from megamoe.errors import Problems, UserError, shown
from megamoe.json_files import read_json
from megamoe.model.decoder import Decoder
from megamoe.model.generation import generate


def load_model(run_dir: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The model of a run with the weights of its newest checkpoint, in `dtype`. Raises UserError."""
    if not folders.step_folders(run_dir / "checkpoints"):
        raise UserError(f"{run_dir} holds no checkpoint yet; wait for the run to save one.")
    source = open_source(find_checkpoint(run_dir))
    problems = model_problems(source, config, str(run_dir))
    if problems:
        raise UserError(*problems)
    model = Decoder(config)
    load_weights(model, source, dtype)
    return model.to(device)


def check(args: argparse.Namespace) -> argparse.Namespace:
    problems = Problems()
    for name, fits, limit in (
        ("num_samples", args.num_samples > 0, "at least 1"),
        ("temperature", args.temperature >= 0, "0 or more"),
        ("top_k", args.top_k is None or args.top_k > 0, "at least 1"),
        ("top_p", args.top_p is None or 0 < args.top_p <= 1, "above 0 and at most 1"),
    ):
        if not fits:
            problems.append(f"{name} is {getattr(args, name)}; it must be {limit}.")
    problems.refuse()
    return args


def main() -> None:
    parser = cli.Parser(description="Continue prompts with a trained model.")
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; by default the one in the run folder")
    parser.add_argument("--end_of_text", metavar="TOKEN", help="token to stop at; by default one that is known")
    parser.add_argument("--prompt", nargs="+", default=["In a quiet library,"], help="one or more texts to continue")
    parser.add_argument("--num_samples", type=int, default=1, help="continuations of each prompt")
    parser.add_argument("--max_new_tokens", type=int, default=120, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token each time")
    parser.add_argument("--top_k", type=int, help="sample from the K most likely tokens only")
    parser.add_argument("--top_p", type=float, help="sample from the smallest set of this probability only")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    args = parser.parse(check=check)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = read_json(args.run_dir / "run.json")
    config = validate(ModelConfig, record.get("model", {}), f"{args.run_dir}/run.json: model")
    tokenizer = load_tokenizer(tokenizer_file(args.tokenizer or args.run_dir), config.vocab_size)
    end_of_text = end_of_text_id(tokenizer, args.end_of_text)
    prompts = [prompt for prompt in args.prompt for _ in range(args.num_samples)]
    ids = encode(tokenizer, prompts)
    ds = record.get("deepspeed", {})
    if not isinstance(ds, dict):
        raise UserError(f"{args.run_dir}/run.json: deepspeed is {shown(ds)}, which no run has written; bring it back.")
    continuations = generate(
        load_model(args.run_dir, config, DTYPES[dtype_of(ds)], device),
        ids,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        end_of_text=end_of_text,
    )
    for number, (prompt, added) in enumerate(zip(prompts, continuations, strict=True), start=1):
        print(f"[sample {number}] prompt: {prompt}\n{prompt}{tokenizer.decode(added)}\n{'-' * 40}")


if __name__ == "__main__":
    cli.run(main)
