"""What is replaced in the step of DeepSpeed's ZeRO optimizer: how it gets the norm, its passes over the gradients, and
which steps it skips.

Its own step reads the gradients twice for infinities and copies each to fp64 for its norm; it reads that norm on the
host, and again for every group that it clips; it copies the gradients in their own precision, then in fp32, and scales
the second copy. And it copies and converts for a reduction also what only one rank has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

NORM_PIECE = 2**18  # elements


class GuardedOptimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's ZeRO optimizer, which also skips a step whose norm is a spike.

    It does so as for a gradient that is not finite, but the loss scale stays as it is: the norm is no sign of a scale
    that is too large.
    """

    # Of the class: an optimizer of DeepSpeed's becomes one of these after it is built.
    is_spike: Callable[[float], bool] | None = None  # asked in the next `step` about its norm, if that is finite
    spike: float | None = None  # the norm of the last step, if that was skipped for it

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Apply the gradients, or skip the update for a norm that is not finite or a spike."""
        self.spike = None
        try:
            super().step(closure)
        finally:
            self.is_spike = None

    def scaled_global_norm(self, norm_type: int = 2) -> Any:
        """As DeepSpeed's; infinite for a spike."""
        return self._unless_spike(super().scaled_global_norm(norm_type))

    def _unless_spike(self, scaled_norm: Any) -> Any:
        if self.is_spike is None:
            return scaled_norm
        norm = float(scaled_norm) / self.loss_scale
        if 0 <= norm < math.inf and self.is_spike(norm):  # DeepSpeed says -1 for what is not finite
            self.spike = norm
            return math.inf
        return scaled_norm

    def _update_scale(self, has_overflow: bool = False) -> None:
        if self.spike is None:
            super()._update_scale(has_overflow)


class GivenNormOptimizer(GuardedOptimizer):
    """DeepSpeed's ZeRO optimizer for states on the device, which is given the norm and does not read the device.

    Every step: after the last backward pass `sum_of_squares`, then `give_norm`, then `step`.
    """

    overlap_comm: bool
    _given_norm: float | None = None  # of all ranks, times the loss scale; from `give_norm` to the end of `step`
    _factor = 1.0  # what the gradients are multiplied by, to unscale and clip them
    _unscaled: Tensor | None = None  # a group's flat gradient, until DeepSpeed asks to unscale it
    _in_reduction: Tensor | None = None  # what the reduction stream may still work on

    def sum_of_squares(self) -> Tensor:
        """Of the gradients that this rank owns, each times the loss scale: () fp64.

        Ranks own disjoint parts of shared weights, replicas disjoint parts of an expert, and other ranks have other
        experts: the sum over all ranks is the square of the norm.
        """
        groups = self.averaged_gradients.values()
        return sum_of_squares([gradient for group in groups for gradient in _flat_gradients(group)])

    def give_norm(self, scaled_norm: float) -> None:
        """Set the norm for the next `step`.

        Args:
            scaled_norm: the root of `sum_of_squares` summed over all ranks, see `norm_of`.
        """
        # By the scale of these gradients: DeepSpeed's step sets that of the next ones before it unscales.
        scale = self.loss_scale
        clip = max((scaled_norm / scale + 1e-6) / self.clip_grad, 1.0) if self.clip_grad > 0 else 1.0  # as it does
        self._given_norm, self._factor = scaled_norm, 1 / (clip * scale)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """As `GuardedOptimizer`.

        Raises AssertionError without a norm that `give_norm` has set since the last step, and where DeepSpeed does not
        call what is replaced here.
        """
        assert self._given_norm is not None, "a step needs the norm of its gradients: call give_norm before"
        try:
            super().step(closure)
            assert self._unscaled is None, "DeepSpeed's step no longer calls unscale_and_clip_grads"
        finally:
            self._given_norm = self._unscaled = None

    # --- called by DeepSpeed for each full bucket of gradients -------------------------------------------------------

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """As DeepSpeed's. But with `overlap_comm` it keeps the tensor until the stream of the backward pass has waited
        for its reduction, as the next call lets it.

        A gradient larger than a bucket is no part of one, and DeepSpeed lets go of it as soon as its reduction is
        issued: the backward pass would write into its memory. `record_stream` would do, but the allocator would take
        new memory for as far as the host is ahead of the device.
        """
        super().average_tensor(tensor, communication_data_type)
        self._in_reduction = tensor if self.overlap_comm else None

    def allreduce_and_scatter(self, bucket: Any, communication_data_type: torch.dtype, **options: Any) -> None:
        """As DeepSpeed's. But what this rank alone has, as with one rank or an expert without replicas, is taken from
        the bucket as it is."""
        if dist.get_world_size(options["process_group"]) > 1:
            super().allreduce_and_scatter(bucket, communication_data_type, **options)
            return
        for _, gradient, total in bucket:
            if total is not None:  # the sum over micro-batches, in another precision
                total.add_(gradient)

    # --- called by DeepSpeed's engine at the end of a backward pass --------------------------------------------------

    def independent_gradient_partition_epilogue(self) -> None:
        """As DeepSpeed's, but with `overlap_comm` the device waits for the reductions, where there the host waits for
        the device."""
        overlaps, accelerator = self.overlap_comm, get_accelerator()
        if overlaps:
            self.reduce_ipg_grads()
            if not accelerator.resolves_data_dependency():
                accelerator.current_stream().wait_stream(self.reduction_stream)
            self._in_reduction = None
            self._clear_previous_reduced_grads()
            self.overlap_comm = False  # for what follows there is nothing to wait for
        try:
            super().independent_gradient_partition_epilogue()
        finally:
            self.overlap_comm = overlaps

    # --- called by DeepSpeed's step(), in this order ----------------------------------------------------------------

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Nothing: the norm shows what is not finite, and `step` skips the update for such a norm."""

    def scaled_global_norm(self, norm_type: int = 2) -> float:
        """The norm that was given, times the loss scale; a Python number, so that no use of it reads the device."""
        return self._unless_spike(self._given_norm)

    def _get_preflattened_grad_partition(self, group_idx: int) -> Tensor:
        """A group's gradients, unscaled and clipped: (partition_size of the group,) fp32."""
        flat = super()._get_preflattened_grad_partition(group_idx)
        if flat is None:
            flat = torch.empty_like(self.single_partition_of_fp32_groups[group_idx])
            gradients = _flat_gradients(self.averaged_gradients[group_idx])
            torch._foreach_copy_(flat.split([len(one) for one in gradients]), gradients)
        self._unscaled = flat if self._factor == 1 else flat.mul_(self._factor)
        return self._unscaled

    def unscale_and_clip_grads(self, grad_groups_flat: Any, total_norm: Any) -> None:
        """Nothing: the flat gradient is unscaled and clipped already. Raises AssertionError for any other."""
        (flat,) = grad_groups_flat
        assert flat is self._unscaled, "DeepSpeed's step no longer calls _get_preflattened_grad_partition"
        self._unscaled = None  # DeepSpeed frees it after the update


def _flat_gradients(group: Any) -> list[Tensor]:
    """A group's gradients, each flat, of which this rank owns all that they hold."""
    flat = getattr(group, "flat_partition", None)  # of gradients that are summed in another precision
    return [gradient.flatten() for gradient in group] if flat is None else [flat]


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Of all values of flat tensors: () fp64."""
    # On CPU torch adds up squares one after the other, and loses the small ones among millions.
    pieces = [piece for one in tensors for piece in one.split(NORM_PIECE if one.is_cpu else max(len(one), 1))]
    norms = torch._foreach_norm(pieces, 2, torch.promote_types(pieces[0].dtype, torch.float32))
    return torch.stack(norms).double().square().sum()


def norm_of(sum_of_squares: float) -> float:
    """The norm, infinite where a gradient is not finite. The sum is NaN or infinite there."""
    return math.sqrt(sum_of_squares) if math.isfinite(sum_of_squares) else math.inf
