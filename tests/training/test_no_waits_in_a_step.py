"""What a step does between backward and the optimizer's update reads the device once, and mixes no devices."""

import pytest
import torch
import torch.distributed as dist
from fake_gpu import DEVICE, HostReads, NoCopies, fake_gpu, join_fake_ranks, model_on_gpu
from ranks import run_alone

from megamoe.config.model import load_preset
from megamoe.training import step_sums
from megamoe.training.balancing import Balance
from megamoe.training.matrix_share import MatrixShare
from megamoe.training.muon import Muon
from megamoe.training.step import balancer_of
from megamoe.training.step_sums import SCALARS, Flags, sum_over_ranks
from megamoe.training.zero_step import GivenNormOptimizer

CONFIG = load_preset("tiny")
LOSSES = 3


def reads_of_a_step(rule):
    numbers = CONFIG.num_hidden_layers * CONFIG.num_local_experts
    reads = step_sums.begin_read = HostReads([1.0] * (SCALARS + LOSSES + CONFIG.num_hidden_layers + 2 * numbers))
    with fake_gpu():
        model = model_on_gpu(CONFIG.model_copy(update={"router_bias_rule": rule}), ep_size=2)
        optimizer = object.__new__(GivenNormOptimizer)
        optimizer.averaged_gradients = {
            0: [torch.empty(size, dtype=torch.bfloat16, device=DEVICE) for size in (7, 100_000)],
            1: [torch.empty(3, 5, dtype=torch.float32, device=DEVICE)],
        }
        balancer, losses = balancer_of(model), torch.zeros(LOSSES, device=DEVICE)
        sums = sum_over_ranks(
            optimizer.sum_of_squares(),
            losses,
            Flags(stop_asked=True),
            balancer.take_counts(),
            model.take_entropies(),
            balancer.take_margins(),
        )
        running = balancer.next_loads(sums.counts)
        on_host = sums.read(running)
        balancer.apply(running, sums.margins)
        assert on_host.squares == 1.0
        assert on_host.losses == [1.0] * LOSSES
        assert on_host.flags == Flags(True, True, True, True)
        balance = Balance(on_host.counts, on_host.running_loads, on_host.entropies)
        assert balance.entropies == [1.0] * CONFIG.num_hidden_layers
        assert {balance.batch_max_vio.device.type, balance.running_max_vio.device.type} == {"cpu"}
        return reads.count


@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_norm_losses_flags_and_balance_come_in_one_read(rule):
    assert run_alone(reads_of_a_step, rule) == 1


def muon_on_gpu():
    """Steps of Muon, one of which follows a restore with AdamW's count on the host, as files give it; where its state
    is then."""
    join_fake_ranks(2)
    with fake_gpu():
        matrices, others = (torch.empty(size, device=DEVICE) for size in (124, 30))
        muon = Muon([{"params": [others]}, {"params": [matrices], "use_muon": True}], lr=0.1, dtype=torch.bfloat16)
        share = MatrixShare([(4, 6), (4, 6), (40, 5)], 124, 0, 2)
        assert share.is_cut
        muon.set_share(matrices, share, dist.group.WORLD)
        for one in (matrices, others):
            one.grad = torch.empty_like(one)
        for _ in range(2):
            muon.step()
    with matrices.fake_mode:
        restored = muon.state_dict()
        restored["state"][0]["step"] = torch.zeros(())
        muon.load_state_dict(restored)
        muon.step()
    with matrices.fake_mode, NoCopies():
        muon.step()
    return {value.device.type for state in muon.state.values() for value in state.values()}


def test_steps_of_muon_read_nothing_and_its_state_is_on_the_device_after_a_restore_too():
    assert run_alone(muon_on_gpu) == {DEVICE}
