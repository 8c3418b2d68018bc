"""What is replaced in the step of DeepSpeed's ZeRO optimizer: how it gets the norm, and its passes over the gradients.

Its own step reads the gradients twice for infinities and copies each to fp64 for its norm; it reads that norm on the
host, and again for every group that it clips; it copies the gradients in their own precision, then in fp32, and scales
the second copy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

NORM_PIECE = 2**18  # elements


class GivenNormOptimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's ZeRO optimizer for states on the device, which is given the norm and does not read the device."""

    scaled_norm: float  # of the gradient over all ranks, times the loss scale; infinite where it is not finite

    def sum_of_squares(self) -> Tensor:
        """Of the gradients that this rank owns, times the loss scale: () fp64.

        Ranks own disjoint parts of shared weights, replicas disjoint parts of an expert, and other ranks have other
        experts: the sum over all ranks is the square of the norm.
        """
        gradients = [gradient for group in self.averaged_gradients.values() for gradient in _flat_gradients(group)]
        # On CPU torch adds up squares one after the other, and loses the small ones among millions.
        pieces = [piece for one in gradients for piece in one.split(NORM_PIECE if one.is_cpu else max(len(one), 1))]
        norms = torch._foreach_norm(pieces, 2, torch.promote_types(pieces[0].dtype, torch.float32))
        return torch.stack(norms).double().square().sum()

    # --- called by DeepSpeed's step(), in this order ----------------------------------------------------------------

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Nothing: the norm shows what is not finite, and `step` skips the update for such a norm."""

    def scaled_global_norm(self, norm_type: int = 2) -> float:
        """The norm that was given; a Python number, so that no use of it reads the device."""
        return self.scaled_norm

    def _get_preflattened_grad_partition(self, group_idx: int) -> Tensor:
        """A group's gradients as one flat tensor, unscaled and clipped."""
        flat = super()._get_preflattened_grad_partition(group_idx)
        if flat is None:
            flat = torch.empty_like(self.single_partition_of_fp32_groups[group_idx])
            gradients = _flat_gradients(self.averaged_gradients[group_idx])
            torch._foreach_copy_(flat.split([len(one) for one in gradients]), gradients)
        scale = self._scale_of_update()
        return flat if scale == 1 else flat.mul_(scale)

    def unscale_and_clip_grads(self, grad_groups_flat: Any, total_norm: Any) -> None:
        """Nothing: the flat gradients are unscaled and clipped already."""

    def _scale_of_update(self) -> float:
        """What the gradients are multiplied by, as DeepSpeed's `unscale_and_clip_grads` has it."""
        clip = 1.0
        if self.clip_grad > 0:
            clip = max((self.scaled_norm / self.loss_scale + 1e-6) / self.clip_grad, 1.0)
        return 1 / (clip * self.loss_scale)


def _flat_gradients(group: Any) -> list[Tensor]:
    """A group's gradients, of which this rank owns all that they hold."""
    flat = getattr(group, "flat_partition", None)  # of gradients that are summed in another precision
    return [gradient.flatten() for gradient in group] if flat is None else [flat]


def norm_of(sum_of_squares: float) -> float:
    """As DeepSpeed says it: infinite where a gradient is not finite."""
    return math.sqrt(sum_of_squares) if math.isfinite(sum_of_squares) else math.inf
