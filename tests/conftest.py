"""One thread a process: the workers of pytest, their ranks and their programs share the cores."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
