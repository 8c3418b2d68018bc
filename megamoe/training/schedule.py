"""The learning rate as a pure function of the step.

DeepSpeed's WarmupDecayLR lags one step behind (after 10 steps it holds the value of step 9), so the engine is given a
LambdaLR over this function instead: after N optimizer steps it holds exactly `learning_rate(N)`.
"""


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, initial: float = 0.0) -> float:
    """Linear warm-up from `initial` to `peak` over `warmup_steps`, then linear decay to 0 at `total_steps`.

    Args:
        step: number of optimizer steps taken, from 0.
        peak: learning rate at `warmup_steps`.

    Returns the learning rate after `step` steps; 0 from `total_steps` on.
    """
    if step < warmup_steps:
        return initial + (peak - initial) * step / warmup_steps
    return peak * max(total_steps - step, 0) / (total_steps - warmup_steps)
