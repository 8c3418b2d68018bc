"""Make a Mixture-of-Experts model of a dense one: `python tools/upcycle.py DENSE_DIR OUT_DIR --experts 8 --top_k 2`.

DENSE_DIR is a Hugging Face directory of Llama, which becomes Mixtral, or of Qwen3, which becomes Qwen3-MoE. Each MLP is
copied; without noise the new model computes what the dense one does. OUT_DIR loads in transformers, and
`pretrain.py --preset OUT_DIR --init_from OUT_DIR` trains it on.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from megamoe.config import cli
from megamoe.formats.export import bytes_of_shard
from megamoe.formats.upcycle import Upcycling, upcycle
from megamoe.utils.disk import check_absent
from megamoe.utils.hardware import memory_gib


def main() -> None:
    parser = cli.Parser(description="Make a Mixture-of-Experts model of a dense one.")
    parser.add_argument("dense", type=Path, help="Hugging Face directory of a dense model, with safetensors")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--experts", type=int, default=8, help="copies of each MLP")
    parser.add_argument("--top_k", type=int, default=2, help="copies that a token is sent to")
    parser.add_argument("--split", type=int, default=1, help="narrower experts that each copy is split into")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="noise on the copies, in standard deviations of a matrix"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the router and the noise")
    parser.add_argument("--max_shard_gb", type=float, default=2.0, help="largest safetensors file, in GB")
    args = parser.parse()
    started = time.perf_counter()
    shard_bytes = bytes_of_shard(args.max_shard_gb)
    check_absent(args.out)
    recipe = Upcycling(args.experts, args.top_k, args.split, args.noise, args.seed)
    made = upcycle(args.dense, args.out, recipe, shard_bytes)
    seconds, memory = time.perf_counter() - started, memory_gib(torch.device("cpu"))
    experts, top_k = recipe.copies * recipe.split, recipe.top_k * recipe.split
    print(f"{made} with {experts} experts per layer, {top_k} per token")
    print(f"wrote {args.out} from {args.dense} in {seconds:.1f} s, {memory:.2f} GiB of memory at most")
