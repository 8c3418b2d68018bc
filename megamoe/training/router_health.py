"""What is wrong with the routers of a run, said once each with what to do."""

from __future__ import annotations

import math

import torch

from megamoe.config.model import ModelConfig
from megamoe.training.balancing import Balance

FIRST_STEPS, FIRST_PART = 500, 10  # balance comes slowly: nothing is said before so many steps, nor a tenth of the run
DEAD_SHARE = 0.01  # of the mean load
COLLAPSED_SHARE = 0.02  # of the entropy of equal scores
MAX_VIO = 2.0  # of the running loads: the busiest expert of a layer has three times the mean
RECOVERED = 2.0  # factor from its limit at which a measure counts as recovered, and may be warned of again


class RouterHealth:
    """Looks at the balance of every step."""

    def __init__(self, config: ModelConfig):
        self._blocks = config.sparse_blocks
        self._remedy = _remedy(config)
        self._said: set[str] = set()

    def warnings(self, step: int, last: int, balance: Balance) -> list[str]:
        """The lines to say after a step of a run that ends with `last`."""
        if step < max(FIRST_STEPS, last // FIRST_PART):
            return []
        experts = balance.running_loads.shape[1]
        loads, expert = (balance.running_loads * experts).min(-1)
        entropy, of_entropy = min(zip(balance.entropies, self._blocks, strict=True))
        max_vio = balance.running_max_vio
        emptiest, fullest = int(loads.argmin()), int(max_vio.argmax())
        blocks, even = self._blocks, math.log(experts)
        # By name: the distance of a measure from its limit as a factor, below 1 where it is beyond, and what to say.
        measures = {
            "dead": (
                loads[emptiest].item() / DEAD_SHARE,
                f"expert {expert[emptiest]} of block {blocks[emptiest]} gets {loads[emptiest]:.2%} of the mean load; "
                f"{self._remedy}, or lower the learning rate",
            ),
            "collapse": (
                entropy / (COLLAPSED_SHARE * even),
                f"the router of block {of_entropy} has an entropy of {entropy:.3f} nats, where equal scores have "
                f"{even:.2f}; lower the learning rate, or set router_z_loss_coef",
            ),
            "max_vio": (
                MAX_VIO / max(max_vio[fullest].item(), torch.finfo().tiny),
                f"the running MaxVio of block {blocks[fullest]} is {max_vio[fullest]:.2f}; {self._remedy}",
            ),
        }
        self._said -= {name for name, (distance, _) in measures.items() if distance >= RECOVERED}
        new = {name: text for name, (distance, text) in measures.items() if distance < 1 and name not in self._said}
        self._said |= new.keys()
        return [f"router warning: {text}" for text in new.values()]


def _remedy(config: ModelConfig) -> str:
    """What makes loads more even."""
    if not config.router_bias:
        return "raise router_aux_loss_coef"
    if config.router_bias_rule == "quantile":
        return "train on more tokens per step, or raise router_aux_loss_coef"
    quantile = 'set router_bias_rule to "quantile", or ' if config.topk_group == config.n_group else ""
    return f"{quantile}raise router_bias_rate or router_aux_loss_coef"
