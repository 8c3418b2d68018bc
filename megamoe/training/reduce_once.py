"""ZeRO-1 that sums the gradients of a step on each rank, in any precision, and reduces them once.

DeepSpeed's ZeRO-1 all-reduces its gradients, bucket by bucket, of which each rank keeps its share: twice the bytes of a
reduce-scatter. And with bf16 weights and sums in fp32 it is another optimizer, whose states cannot be resharded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor

from megamoe.training.zero_step import GivenNormOptimizer


class ReduceOnceOptimizer(GivenNormOptimizer):
    """DeepSpeed's ZeRO-1 optimizer for states on the device, without its buckets.

    Each flat group of weights has one flat sum of gradients, from the first gradient of a step to the end of its last
    backward pass, where a reduce-scatter gives every rank its share. With `overlap_comm` that begins as soon as the
    last gradient of the group has come.
    """

    _sums: list[Tensor]  # of each flat group: (ranks * partition_size of the group,); none between two steps
    _awaited: list[int]  # gradients of each that have not come, in the last backward pass of a step
    _works: list[Any]  # reductions that run

    @classmethod
    def take(cls, zero: DeepSpeedZeroOptimizer, dtype: torch.dtype) -> None:
        """Make an optimizer of DeepSpeed's one of these, which sums in `dtype`."""
        zero.__class__ = cls
        zero.gradient_accumulation_dtype = dtype
        zero._sums, zero._awaited, zero._works = [], [], []
        if not zero._grad_acc_hooks:  # DeepSpeed makes none without overlap_comm and contiguous_gradients
            zero.create_gradient_handling_hooks()

    # --- called by DeepSpeed for each gradient of a backward pass ----------------------------------------------------

    def process_gradients(self, param: Any, i: int) -> None:
        """Add the gradient of a weight of the group `i` to the sums."""
        if not self._sums:
            dtype = self.gradient_accumulation_dtype
            self._sums = [torch.zeros_like(flat, dtype=dtype) for flat in self.bit16_groups_flat]
            self._awaited = [len(group) for group in self.bit16_groups]
        # DeepSpeed's weights are views of their flat group.
        self._sums[i].as_strided(param.shape, param.stride(), param.storage_offset()).add_(param.grad)
        param.grad = None
        if self.is_gradient_accumulation_boundary():
            self._awaited[i] -= 1
            if self.overlap_comm and self._awaited[i] == 0:
                self._reduce(i)

    def _reduce(self, number: int) -> None:
        """Begin to reduce a group."""
        total, group = self._sums[number], self.real_dp_process_group[number]
        ranks, wire = dist.get_world_size(group), self.communication_data_type
        share = total.div_(dist.get_world_size(self.dp_process_group))  # experts' too: the mean over all tokens
        if ranks > 1:
            share = total.new_empty(int(self.partition_size[number]), dtype=wire)
            self._works.append(dist.reduce_scatter_tensor(share, total.to(wire), group=group, async_op=True))
        flat = share.dtype == torch.float32  # needs no copy to be applied
        self.averaged_gradients[number] = GradPartitionBufferGroup([share], share) if flat else [share]

    # --- called by DeepSpeed's engine at the end of the last backward pass of a step ---------------------------------

    def independent_gradient_partition_epilogue(self) -> None:
        """Reduce what is left, on every rank alike, and wait, as the device does, for all."""
        for number in range(len(self._sums)):
            if self.averaged_gradients.get(number) is None:
                self._reduce(number)
        for work in self._works:  # which hold their tensors until then
            work.wait()
        self._sums, self._works = [], []
