"""Runs on GPUs that repeat bit for bit: `--deterministic`."""

from __future__ import annotations

import os

import torch

# What fixes the order of sums in cuBLAS (docs.nvidia.com/cuda/cublas, "Results reproducibility") and in NCCL, which
# would else choose between algorithms, of which NVLink's own reduction (NVLS) has no fixed order.
SETTINGS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


def make_deterministic() -> None:
    """Give every sum one order, at the cost of speed; an operator that has none raises RuntimeError. To be called
    before anything uses the device.

    torch then takes the repeatable backward of its attention kernels and leaves cuDNN's out, and
    `model/grouped_gemm.py` leaves out the kernel whose tuning may come out differently. On CPU all is repeatable
    without.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    # Or every new tensor would be filled with NaN; a step reads nothing before it is written, which a test holds.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
