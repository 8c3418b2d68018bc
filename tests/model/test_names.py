import re

import pytest
import torch
from toy import PRESET

from megamoe.config import ModelConfig
from megamoe.model.costs import parameter_shapes
from megamoe.model.decoder import Decoder
from megamoe.model.names import engine_name, is_buffer, plain_name, same_expert_of_first_rank
from megamoe.topology import ExpertTopology

CONFIG = ModelConfig(**PRESET)


def engine_state(ep_size=1):
    with torch.device("meta"):
        return Decoder(CONFIG, topology=ExpertTopology(CONFIG.num_local_experts, ep_size, ep_size)).state_dict()


def test_plain_names_are_those_of_the_plan_and_have_nothing_of_deepspeed():
    names = {plain_name(name) for name in engine_state() if not is_buffer(name)}
    assert names == parameter_shapes(CONFIG).keys()
    assert not any("deepspeed" in name for name in names)


def test_a_plain_name_leads_back_to_the_engines():
    for name in engine_state():
        assert engine_name(plain_name(name)) == name


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_the_ranks_of_an_expert_parallel_group_hold_every_expert_once(ep_size):
    experts_per_rank = CONFIG.num_local_experts // ep_size
    local = [name for name in engine_state(ep_size) if "deepspeed_experts" in name]
    names = [plain_name(name, rank * experts_per_rank) for rank in range(ep_size) for name in local]
    assert len(names) == len(set(names))
    assert set(names) == {name for name in parameter_shapes(CONFIG) if ".experts." in name}
    for rank in range(ep_size):
        for name in local:
            first = same_expert_of_first_rank(plain_name(name, rank * experts_per_rank), experts_per_rank)
            assert first == plain_name(name)


def test_only_the_routers_statistics_are_buffers():
    found = {re.sub(r"\d+", "N", name) for name in engine_state() if is_buffer(name)}
    assert {name.rpartition(".")[2] for name in found} == {"selection_bias", "running_load"}
    assert all(is_buffer(plain_name(name)) for name in engine_state() if is_buffer(name))
