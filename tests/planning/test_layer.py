"""What the planner counts of a block, compared with what torch dispatches for one block more."""

import os
from dataclasses import replace

import deepspeed
import pytest
import torch
from operators import Operators, rms_norm_as_one_operator
from ranks import run_alone
from torch import nn
from toy import shipped

from megamoe.config.model import load_preset
from megamoe.launch.distributed import configure_deepspeed
from megamoe.model import dispatch, dropout
from megamoe.model.attention import attend
from megamoe.model.decoder import Decoder
from megamoe.model.latent_attention import MultiHeadLatentAttention
from megamoe.model.topology import ExpertTopology
from megamoe.planning.attention_cost import is_masked
from megamoe.planning.layer import BlockKind, block_cost
from megamoe.planning.part_cost import BothWays
from megamoe.planning.sharding import read_setup

BARE = {"expert_dropout": 0.0, "router_jitter_noise": 0.0}
FULL = {"expert_dropout": 0.05, "router_jitter_noise": 0.01}
GATED = {**FULL, "gated_mlp": True, "router_score": "sigmoid"}
LATENT = {
    "num_latent_tokens": 0, "num_key_value_heads": 2, "head_dim": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 24, "v_head_dim": 64,
}  # fmt: skip
SLIDING = {"num_latent_tokens": 0, "sliding_window": 7}
LENGTH, BATCH = 64, 2
DTYPES = {2: torch.bfloat16, 4: torch.float32}
SPARSE, DENSE = BlockKind(False), BlockKind(True)


def setup_of(changes, ep_size=1, weight_bytes=2, on_cpu=True):
    config = load_preset("tiny").model_copy(update=changes)
    ds = shipped("zero2" if weight_bytes == 2 else "zero2_fp32")
    ds["train_micro_batch_size_per_gpu"] = BATCH
    return read_setup(config, ds, ep_size, ep_size, LENGTH, on_cpu)


def kind_of(setup, is_dense=False):
    return BlockKind(is_dense, setup.model.window(0))


class Uncomputed:
    """A product of matrices that only has the shape of the real one: nobody looks at its values."""

    def __init__(self, product):
        self.product, self._schema = product, product._schema

    def __call__(self, *args):
        out = self.product(*(one.to("meta") if isinstance(one, torch.Tensor) else one for one in args))
        return torch.zeros_like(out, device="cpu")


PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten._grouped_mm.default]


class QuickOperators(Operators):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_slow = func in PRODUCTS and args[0].dtype == torch.bfloat16  # routing is in fp32
        return super().__torch_dispatch__(Uncomputed(func) if is_slow else func, types, args, kwargs)


def draw_what_is_small(self, mean, std, generator=None, draw=torch.Tensor.normal_):
    """Experts' weights need no values; an embedding does, for its rows choose experts."""
    return draw(self, mean, std, generator=generator) if self.numel() <= 2**17 else self.fill_(std)


def attend_as_on_a_gpu(self, query, key, value):
    return attend(query, key, value.transpose(1, 2).contiguous().transpose(1, 2), None, self.scale)


def step(setup, layers, is_dense):
    """(operators, bytes) of forward and backward with that number of layers, of which the last may be dense."""
    changed = {"num_hidden_layers": layers, "mlp_only_layers": [1] if layers > 1 and is_dense else []}
    config = setup.model.model_copy(update=changed)
    topology = ExpertTopology(config.num_local_experts, setup.ep_size, setup.world_size)
    torch.Tensor.normal_ = draw_what_is_small
    model = Decoder(config, topology=topology).to(DTYPES[setup.weight_bytes])
    for router in model.routers():
        for name, buffer in list(router.named_buffers()):
            setattr(router, name, buffer.float() if buffer.is_floating_point() else buffer)
    for moe in model.moe_layers() if setup.ep_size > 1 else ():
        moe.set_deepspeed_parallelism()
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size, (BATCH, LENGTH))
    operators = QuickOperators()
    if not setup.on_cpu:  # as a GPU has them
        nn.RMSNorm.forward = rms_norm_as_one_operator(operators)
        dispatch.CPU_ROW_MULTIPLE = 1
        dropout.Dropout.forward = lambda self, x: torch.native_dropout(x, self.p, True)[0] if self.p else x
        MultiHeadLatentAttention._attend_causally = attend_as_on_a_gpu
    with operators:
        loss = model(ids, ids)
    forward = BothWays(operators.calls.total(), operators.bytes)
    with operators:
        loss.backward()
    return forward, BothWays(operators.calls.total(), operators.bytes)


def dispatched(setup, is_dense=False):
    """(operators, bytes) of one layer more, each both ways; in a process of its own, for it changes modules."""
    if setup.ep_size > 1 and not torch.distributed.is_initialized():
        from torch.testing._internal.distributed.fake_pg import FakeStore

        ranks = str(setup.ep_size)
        os.environ.update(RANK="0", WORLD_SIZE=ranks, LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
        configure_deepspeed()
        torch.distributed.init_process_group("fake", rank=0, world_size=setup.ep_size, store=FakeStore())
        deepspeed.init_distributed(dist_backend="fake", verbose=False)
    (forward, both), (more_forward, more_both) = (step(setup, layers, is_dense) for layers in (1, 2))
    one, all_of_it = more_forward + forward * -1, more_both + both * -1
    found = [BothWays(ahead, total - ahead) for ahead, total in
             ((one.forward, all_of_it.forward), (one.backward, all_of_it.backward))]  # fmt: skip
    return found[0], found[1]


def dispatched_by_each(setups, is_dense=False):
    """As `dispatched`, for setups of one `ep_size` that all are, or all are not, on CPU."""
    return [dispatched(setup, is_dense) for setup in setups]


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(
    ("ep_size", "changes"), [(1, [BARE, FULL, GATED, {**BARE, "num_latent_tokens": 0}]), (4, [FULL, GATED])]
)
def test_the_operators_counted_are_those_dispatched(ep_size, changes, on_cpu):
    setups = [setup_of(one, ep_size, on_cpu=on_cpu) for one in changes]
    found = run_alone(dispatched_by_each, setups)
    assert [operators for operators, _ in found] == [block_cost(setup, SPARSE).operators for setup in setups]


BALANCE = {"router_aux_loss_coef": 0.01}
OF_SPARSE_BLOCKS = {
    "shared experts": {"n_shared_experts": 2},
    "gated shared experts with a gate": {"n_shared_experts": 2, "shared_expert_gate": True, "gated_mlp": True},
    "groups": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "quantile bias": {"router_bias_rule": "quantile"},
    "plain scores": {"norm_topk_prob": False, "router_bias": False},
    "plain sigmoid scores": {"norm_topk_prob": False, "router_score": "sigmoid"},
    "balance of sequences": BALANCE,
    "balance of sequences, plain sigmoid": {**BALANCE, "router_score": "sigmoid", "norm_topk_prob": False},
    "balance of micro-batches": {**BALANCE, "router_aux_loss_type": "micro_batch"},
    "balance of all, sigmoid": {**BALANCE, "router_aux_loss_type": "global_batch", "router_score": "sigmoid"},
    "z-loss": {"router_z_loss_coef": 0.01},
    "balance and z-loss": {**BALANCE, "router_z_loss_coef": 0.01},
}
OF_ALL_BLOCKS = {
    "nothing": {},
    "gated": {"gated_mlp": True},
    "norm of each head": {"qk_norm": "head"},
    "norm of all heads": {"qk_norm": "full"},
    "biases": {"attention_bias": True, "attention_out_bias": True},
    "half rotated": {"partial_rotary_factor": 0.5},
    "half rotated, interleaved": {"partial_rotary_factor": 0.5, "rope_interleaved": True},
    # On a GPU as many heads, for with groups they are copied there.
    "window": {**SLIDING, "num_key_value_heads": 2},
    "latent attention": LATENT,
    "latent attention, compressed queries": {**LATENT, "q_lora_rank": 16, "attention_bias": True},
}
NARROW_VALUES = {"latent attention, narrow values": {**LATENT, "v_head_dim": 48}}  # as a CPU has them


def test_the_operators_counted_of_every_part_of_a_sparse_block_on_cpu_are_those_dispatched():
    parts = OF_ALL_BLOCKS | OF_SPARSE_BLOCKS | NARROW_VALUES
    setups = {name: setup_of({**BARE, **changes}) for name, changes in parts.items()}
    found = run_alone(dispatched_by_each, list(setups.values()))
    for (name, setup), (operators, _) in zip(setups.items(), found, strict=True):
        assert operators == block_cost(setup, kind_of(setup)).operators, name


WIDE = {
    "vocab_size": 256, "hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def assert_bytes(setup, kind, moved, allowed=0.04):
    cost = block_cost(setup, kind)
    backward = [one for product in cost.products for one in product.backward()]
    products = BothWays(*(sum(one.calls * one.bytes(2) for one in products) for products in (cost.products, backward)))
    m = setup.model
    widths = m.num_attention_heads * 2 * m.head_dim + m.num_key_value_heads * 2 * (
        m.head_dim if setup.on_cpu else m.value_dim)  # fmt: skip
    # The mask's numbers are read.
    attended = BothWays(1, 2) * (2 * setup.tokens * widths + 2 * setup.seq_len**2 * is_masked(setup, kind.window))
    # Of each of two all-to-alls: what is sent, allocated, received and returned.
    exchanged = BothWays(8, 8) * (2 * setup.rows * m.hidden_size * (setup.ep_size > 1))
    counted = cost.bytes + products + attended + exchanged
    assert counted.forward == pytest.approx(moved.forward, rel=allowed)
    assert counted.backward == pytest.approx(moved.backward, rel=allowed)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(
    ("ep_size", "changes"),
    # With all experts for each token, ranks exchange equally many rows.
    [(1, [BARE, FULL, GATED]), (4, [{**FULL, "num_experts_per_tok": 8}])],
)
def test_the_bytes_counted_are_those_that_operators_read_and_write(ep_size, changes, on_cpu):
    setups = [setup_of({**one, **WIDE}, ep_size, on_cpu=on_cpu) for one in changes]
    for setup, (_, moved) in zip(setups, run_alone(dispatched_by_each, setups), strict=True):
        assert_bytes(setup, SPARSE, moved)


# On CPU only dense blocks: in sparse ones there, the fill of the experts' rows changes with the routing.
@pytest.mark.parametrize(("on_cpu", "is_dense"), [(True, True), (False, True), (False, False)])
def test_the_operators_counted_of_every_part_are_those_dispatched_and_read_and_write_the_bytes(on_cpu, is_dense):
    parts = OF_ALL_BLOCKS | ({} if is_dense else OF_SPARSE_BLOCKS) | (NARROW_VALUES if on_cpu else {})
    changed = {**BARE, **WIDE, "num_latent_tokens": 0} | ({"num_experts_per_tok": 8} if on_cpu else {})
    setups = {
        name: setup_of({**changed, **changes, "num_key_value_heads": 4}, on_cpu=on_cpu)
        for name, changes in parts.items()
    }
    found = run_alone(dispatched_by_each, list(setups.values()), is_dense)
    off = {}
    for (name, setup), (operators, moved) in zip(setups.items(), found, strict=True):
        try:
            assert operators == block_cost(setup, kind_of(setup, is_dense)).operators
            assert_bytes(setup, kind_of(setup, is_dense), moved)
        except AssertionError as error:
            off[name] = str(error)
    assert not off


def test_in_fp32_nothing_is_cast():
    # On a GPU, where RMSNorm is one kernel in any precision.
    setup = setup_of(FULL, 1, 4, on_cpu=False)
    operators, _ = run_alone(dispatched, setup)
    assert operators == block_cost(setup, SPARSE).operators


def test_a_loop_has_a_product_for_each_expert():
    setup = setup_of(BARE, 1, 2, on_cpu=False)
    plain, loop = (block_cost(one, SPARSE) for one in (setup, replace(setup, kernel="loop")))
    assert sum(one.flops for one in loop.products) == sum(one.flops for one in plain.products)
    assert loop.operators.forward - plain.operators.forward == 2 * 8
