"""Make a Mixture-of-Experts model of a dense one; without noise it computes what the dense one does."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from pydantic import Field

from megamoe.commands.options import Shards
from megamoe.config.cli import Positional
from megamoe.formats.upcycle import Upcycling
from megamoe.formats.upcycle import upcycle as write_upcycled
from megamoe.utils.disk import check_absent
from megamoe.utils.hardware import memory_gib


class Upcycle(Shards, Upcycling):
    dense: Positional[Path] = Field(description="Hugging Face directory of a dense Llama or Qwen3, with safetensors")
    out: Positional[Path] = Field(description="directory to write")


def upcycle(options: Upcycle) -> None:
    started = time.perf_counter()
    check_absent(options.out)
    made = write_upcycled(options.dense, options.out, options, options.shard_bytes)
    seconds, memory = time.perf_counter() - started, memory_gib(torch.device("cpu"))
    experts, top_k = options.experts * options.split, options.top_k * options.split
    print(f"{made} with {experts} experts per layer, {top_k} per token")
    print(f"wrote {options.out} from {options.dense} in {seconds:.1f} s, {memory:.2f} GiB of memory at most")
