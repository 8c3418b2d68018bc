"""The learning rate as a pure function of the step.

DeepSpeed's schedulers lag one step behind (after 10 steps they hold the value of step 9), so the engine is given a
LambdaLR over this function instead: after N optimizer steps it holds exactly `learning_rate(N)`. Only the cosine of its
WarmupCosineLR, which counts one step further than its warm-up, is on time.
"""

import math

from megamoe.config.schedule import Decay


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    initial: float = 0.0,
    decay: Decay | None = None,
    decay_steps: int = 0,
    total_steps: int | None = None,
    floor: float = 0.0,
) -> float:
    """Linear warm-up from `initial` to `peak` over `warmup_steps`, then `peak` until the decay, which comes down to
    `floor` over the last `decay_steps` before `total_steps`.

    Args:
        step: number of optimizer steps taken, from 0.
        decay: shape of the decay; without it the rate stays at `peak`.

    Returns the learning rate after `step` steps; `floor` from `total_steps` on.
    """
    if step < warmup_steps:
        return initial + (peak - initial) * step / warmup_steps
    if decay is None or total_steps is None or step < total_steps - decay_steps:
        return peak
    return floor + SHAPES[decay](peak - floor, max(total_steps - step, 0), decay_steps)


def linear(height: float, left: int, steps: int) -> float:
    """What is left of `height`, with `left` of the decay's `steps` to go."""
    return height * left / steps


def cosine(height: float, left: int, steps: int) -> float:
    """Half a cosine (arXiv 1608.03983): flat at both ends. By its half angle, for 1 - cos loses digits near the end."""
    return height * math.sin(math.pi * left / steps / 2) ** 2


def one_minus_sqrt(height: float, left: int, steps: int) -> float:
    """Steep at first (arXiv 2405.18392)."""
    return height * (1 - math.sqrt((steps - left) / steps))


SHAPES = {"linear": linear, "cosine": cosine, "1-sqrt": one_minus_sqrt}
