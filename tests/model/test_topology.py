"""Which experts a rank holds."""

from itertools import combinations, product
from statistics import mean

import pytest
import torch.distributed as dist
from ranks import run_ranks

from megamoe.model.topology import ExpertTopology


def groups_of_deepspeed(sizes):
    """By ep_size (ranks that hold one set of experts together, ranks that hold the same experts), as DeepSpeed has made
    them."""
    from deepspeed.utils import groups

    found = {}
    for ep_size in sizes:
        groups._create_expert_and_data_parallel(ep_size)
        name = f"ep_size_{ep_size}"
        members = [groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)]
        found[ep_size] = [dist.get_process_group_ranks(group) for group in members]
    return found


def test_the_groups_are_those_that_deepspeed_makes():
    for rank, made in enumerate(run_ranks(4, groups_of_deepspeed, (1, 2, 4))):
        for ep_size, (together, alike) in made.items():
            here = ExpertTopology(8, ep_size, 4, rank)
            others = [ExpertTopology(8, ep_size, 4, other) for other in range(4)]
            assert together.index(rank) == here.ep_rank
            assert alike.index(rank) == here.replica
            assert alike == [other.rank for other in others if other.expert_ids == here.expert_ids]
            assert len(alike) == here.replicas
            assert len(alike) == 1 or alike[1] - alike[0] == here.replica_stride
            assert [expert for other in together for expert in others[other].expert_ids] == list(range(8))


def test_the_expected_ranks_of_a_token_are_the_mean_over_all_sets_of_experts():
    for ep_size, choices in product((1, 2, 4, 8), (1, 2, 5)):
        here = ExpertTopology(8, ep_size)
        owners = [{expert // here.experts_per_rank for expert in chosen} for chosen in combinations(range(8), choices)]
        assert here.expected_ranks(choices) == pytest.approx(mean(map(len, owners)))
