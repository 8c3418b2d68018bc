"""What the planner counts of a layer, compared with what torch dispatches for one layer more."""

import os

import deepspeed
import pytest
import torch
from operators import Operators, rms_norm_as_one_operator
from ranks import run_alone
from torch import nn
from toy import SHIPPED

from megamoe.config import load_preset
from megamoe.json_files import read_json
from megamoe.model import dispatch, dropout
from megamoe.model.decoder import Decoder
from megamoe.planning.layer import BothWays, Product, layer_bytes, layer_operators, layer_products
from megamoe.planning.sharding import read_setup
from megamoe.topology import ExpertTopology
from megamoe.training.distributed import configure_deepspeed

BARE = {"expert_dropout": 0.0, "router_jitter_noise": 0.0}
FULL = {"expert_dropout": 0.05, "router_jitter_noise": 0.01}
GATED = {**FULL, "gated_mlp": True, "router_score": "sigmoid"}
LENGTH, BATCH = 64, 2
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def setup_of(changes, ep_size, weight_bytes, on_cpu):
    config = load_preset("tiny").model_copy(update=changes)
    ds = read_json(SHIPPED / ("zero2.json" if weight_bytes == 2 else "zero2_fp32.json"))
    ds["train_micro_batch_size_per_gpu"] = BATCH
    return read_setup(config, ds, ep_size, ep_size, LENGTH, on_cpu)


def step(setup, layers):
    """(operators, bytes) of forward and backward with so many layers."""
    config = setup.model.model_copy(update={"num_hidden_layers": layers})
    topology = ExpertTopology(config.num_local_experts, setup.ep_size, setup.world_size)
    model = Decoder(config, topology=topology).to(DTYPES[setup.weight_bytes])
    for router in model.routers():
        router.selection_bias, router.running_load = router.selection_bias.float(), router.running_load.float()
    for moe in model.moe_layers() if setup.ep_size > 1 else ():
        moe.set_deepspeed_parallelism()
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size, (BATCH, LENGTH))
    operators = Operators()
    if not setup.on_cpu:  # as a GPU has them
        nn.RMSNorm.forward = rms_norm_as_one_operator(operators)
        dispatch.CPU_ROW_MULTIPLE = 1
        dropout.Dropout.forward = lambda self, x: torch.native_dropout(x, self.p, True)[0] if self.p else x
    with operators:
        loss = model(ids, ids)
    forward = BothWays(operators.calls.total(), operators.bytes)
    with operators:
        loss.backward()
    return forward, BothWays(operators.calls.total(), operators.bytes)


def dispatched(setup):
    """(operators, bytes) of one layer more, each both ways; in a process of its own, for it changes modules."""
    if setup.ep_size > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        ranks = str(setup.ep_size)
        os.environ.update(RANK="0", WORLD_SIZE=ranks, LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
        configure_deepspeed()
        torch.distributed.init_process_group("fake", rank=0, world_size=setup.ep_size, store=FakeStore())
        deepspeed.init_distributed(dist_backend="fake", verbose=False)
    (forward, both), (more_forward, more_both) = step(setup, 1), step(setup, 2)
    one, all_of_it = more_forward + forward * -1, more_both + both * -1
    found = [BothWays(ahead, total - ahead) for ahead, total in
             ((one.forward, all_of_it.forward), (one.backward, all_of_it.backward))]  # fmt: skip
    return found[0], found[1]


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(
    ("changes", "ep_size", "weight_bytes"),
    [(BARE, 1, 2), (FULL, 1, 2), (GATED, 1, 2), (FULL, 4, 2), (GATED, 4, 2), ({**BARE, "num_latent_tokens": 0}, 1, 2)],
    ids=["bare", "full", "gated, sigmoid", "ep_size 4", "ep_size 4, gated, sigmoid", "no latents"],
)
def test_the_operators_counted_are_those_dispatched(changes, ep_size, weight_bytes, on_cpu):
    setup = setup_of(changes, ep_size, weight_bytes, on_cpu)
    operators, _ = run_alone(dispatched, setup)
    assert operators == layer_operators(setup)


WIDE = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(
    ("changes", "ep_size"),
    # With all experts for each token, ranks exchange equally many rows.
    [(BARE, 1), (FULL, 1), (GATED, 1), ({**FULL, "num_experts_per_tok": 8}, 4)],
    ids=["bare", "full", "gated, sigmoid", "ep_size 4"],
)
def test_the_bytes_counted_are_those_that_operators_read_and_write(changes, ep_size, on_cpu):
    setup = setup_of({**changes, **WIDE}, ep_size, 2, on_cpu)
    _, moved = run_alone(dispatched, setup)
    forward = layer_products(setup)
    backward = [one for product in forward for one in product.backward()]
    products = BothWays(*(sum(one.calls * one.bytes(2) for one in products) for products in (forward, backward)))
    m = setup.model
    attended = 2 * setup.tokens * (m.num_attention_heads + m.num_key_value_heads) * m.head_dim
    # Of each of two all-to-alls: what is sent, allocated, received and returned.
    exchanged = BothWays(8, 8) * (2 * setup.rows * m.hidden_size * (ep_size > 1))
    counted = layer_bytes(setup) + products + BothWays(2, 4) * attended + exchanged
    assert counted.forward == pytest.approx(moved.forward, rel=0.04)
    assert counted.backward == pytest.approx(moved.backward, rel=0.04)


def test_in_fp32_nothing_is_cast():
    # On a GPU, where RMSNorm is one kernel in any precision.
    setup = setup_of(FULL, 1, 4, on_cpu=False)
    operators, _ = run_alone(dispatched, setup)
    assert operators == layer_operators(setup)


def test_a_loop_has_a_product_for_each_expert():
    setup = setup_of(BARE, 1, 2, on_cpu=False)
    loop = type(setup)(**{**vars(setup), "kernel": "loop"})
    assert sum(one.flops for one in layer_products(loop)) == sum(one.flops for one in layer_products(setup))
    assert layer_operators(loop).forward - layer_operators(setup).forward == 2 * 8


def test_backward_has_both_gradients_of_a_product():
    product = Product(rows=32, columns=7, inside=5, groups=3, calls=2)
    by_rows, by_weight = product.backward()
    assert (by_rows.rows, by_rows.columns, by_rows.inside) == (32, 5, 7)
    assert (by_weight.rows, by_weight.columns, by_weight.inside) == (7, 5, 32)
    assert by_rows.flops == by_weight.flops == product.flops == 2 * 3 * 2 * 32 * 7 * 5
    assert product.bytes(2) == 2 * 3 * (32 * 5 + 5 * 7 + 32 * 7)
