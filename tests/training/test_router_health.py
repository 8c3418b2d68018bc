"""What is said of routers that do badly."""

import pytest
import torch
from toy import PRESET

from megamoe.config.model import ModelConfig
from megamoe.training.balancing import Balance
from megamoe.training.router_health import FIRST_STEPS, RouterHealth

CONFIG = ModelConfig(**{**PRESET, "num_hidden_layers": 6, "mlp_only_layers": [1, 2, 3, 4]})


def balance(loads=(0.25, 0.25, 0.25, 0.25), entropy=1.2):
    even = [0.25] * 4
    return Balance(torch.ones(2, 4, dtype=torch.int64), torch.tensor([even, list(loads)]), [1.3, entropy])


CASES = {
    "expert 2 of block 5 gets 0.40% of the mean load": (balance((0.349, 0.3, 0.001, 0.35)), balance()),
    "the router of block 5 has an entropy of 0.010 nats, where equal scores have 1.39": (
        balance(entropy=0.01),
        balance(),
    ),
    "the running MaxVio of block 5 is 2.20": (balance((0.8, 0.1, 0.05, 0.05)), balance((0.45, 0.2, 0.2, 0.15))),
}


@pytest.mark.parametrize("text", CASES)
def test_each_is_said_once_and_again_only_after_it_has_recovered(text):
    bad, good = CASES[text]
    health = RouterHealth(CONFIG)
    assert health.warnings(FIRST_STEPS - 1, 1000, bad) == []
    assert health.warnings(FIRST_STEPS, 10 * FIRST_STEPS + 10, bad) == []  # not a tenth of the run
    (line,) = health.warnings(FIRST_STEPS, 1000, bad)
    assert line.startswith("router warning: " + text)
    assert "; " in line  # and what to do
    assert health.warnings(FIRST_STEPS + 1, 1000, bad) == []
    assert health.warnings(FIRST_STEPS + 2, 1000, good) == []
    assert health.warnings(FIRST_STEPS + 3, 1000, bad) == [line]


def test_nothing_is_said_of_balanced_routers_nor_again_of_one_that_is_hardly_better():
    health = RouterHealth(CONFIG)
    assert health.warnings(FIRST_STEPS, 1000, balance()) == []
    assert len(health.warnings(FIRST_STEPS, 1000, balance((0.349, 0.3, 0.001, 0.35)))) == 1
    assert health.warnings(FIRST_STEPS, 1000, balance((0.347, 0.3, 0.003, 0.35))) == []
    assert health.warnings(FIRST_STEPS, 1000, balance((0.349, 0.3, 0.001, 0.35))) == []


def test_the_remedy_is_one_that_the_configuration_leaves():
    for changes, remedy in (
        ({}, 'set router_bias_rule to "quantile", or raise router_bias_rate or router_aux_loss_coef'),
        ({"num_local_experts": 8, "n_group": 4, "topk_group": 2}, "raise router_bias_rate or router_aux_loss_coef"),
        ({"router_bias": False}, "raise router_aux_loss_coef"),
        ({"router_bias_rule": "quantile"}, "train on more tokens per step, or raise router_aux_loss_coef"),
    ):
        health = RouterHealth(ModelConfig(**{**CONFIG.model_dump(), **changes}))
        (line,) = health.warnings(FIRST_STEPS, 1000, balance((0.8, 0.1, 0.05, 0.05)))
        assert line.endswith(f"; {remedy}")
