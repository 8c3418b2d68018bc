"""Measure what summing gradients over many ranks in 16 bits costs in accuracy, without those ranks.

    python tools/dev/benchmark_reduction.py

Each rank's gradient is in bf16: one that all share, times --shared, plus one of its own, both normal. The sums of all
ranks are compared with those in fp64: in a ring, which adds one rank after the other and rounds after each, and in
pairs, as a tree does. Prints the error of the sum relative to its norm, and how much of the sum along itself is left.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from megamoe.config import cli
from megamoe.utils.errors import UserError

RANKS = (8, 64, 1024)


def gradients(ranks: int, elements: int, shared: float) -> Iterator[Tensor]:
    """Each rank's, divided by the number of ranks as DeepSpeed does before it sums: (elements,) bf16."""
    generator = torch.Generator().manual_seed(0)
    common = shared * torch.randn(elements, generator=generator)
    for _ in range(ranks):
        yield ((common + torch.randn(elements, generator=generator)) / ranks).bfloat16()


def sum_in_ring(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """One after the other, rounded to `dtype` after each."""
    return functools.reduce(torch.add, (part.to(dtype) for part in parts))


def sum_in_pairs(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Neighbours, then neighbouring sums, rounded to `dtype` after each."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    half = len(parts) // 2
    return sum_in_pairs(parts[:half], dtype) + sum_in_pairs(parts[half:], dtype)


def compare(total: Tensor, exact: Tensor) -> tuple[float, float]:
    """(error relative to the norm of `exact`, share of `exact` that is in `total`)."""
    total = total.double()
    return float((total - exact).norm() / exact.norm()), float(total @ exact / (exact @ exact))


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Measure what summing gradients in 16 bits costs in accuracy.",
    )
    parser.add_argument("--elements", type=int, default=2**16, help="numbers in a gradient")
    parser.add_argument(
        "--shared", type=float, default=1.0, help="what all ranks share, over what each has of its own; 0: noise alone"
    )
    args = parser.parse_args()
    if args.elements < 1:
        raise UserError(f"--elements is {args.elements}; give at least 1.")
    print("ranks  order     dtype     error  share")
    for ranks in RANKS:
        parts = list(gradients(ranks, args.elements, args.shared))
        exact = torch.stack(parts).sum(0, dtype=torch.float64)
        for order, add in (("ring", sum_in_ring), ("in pairs", sum_in_pairs)):
            for dtype in (torch.bfloat16, torch.float32):
                error, share = compare(add(parts, dtype), exact)
                print(f"{ranks:5}  {order:8}  {str(dtype).removeprefix('torch.'):8}  {error:6.1e}  {share:.3f}")


if __name__ == "__main__":
    cli.run(main)
