"""Expert parallelism: which experts a rank holds, and with whom it shares them.

`ep_size` consecutive ranks hold one set of a layer's experts, each an equal part of it; so DeepSpeed makes its
expert-parallel groups (`deepspeed/utils/groups.py`). The ranks that hold the same experts, `ep_size` apart, are
data-parallel replicas of them. Nothing else in megamoe computes with `ep_size`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertTopology:
    """One rank's place among the ranks and the experts of every layer."""

    num_experts: int  # of a layer, over all ranks
    ep_size: int = 1
    world_size: int = 1
    rank: int = 0

    @staticmethod
    def problems(ep_size: int, num_experts: int, world_size: int, preset: str) -> list[str]:
        """What keeps `ep_size` from these ranks and experts, one sentence each."""
        if ep_size < 1:
            return [f"ep_size is {ep_size}; give at least 1."]
        found = []
        if world_size % ep_size:
            found.append(f"ep_size is {ep_size}, which does not divide the {world_size} ranks; choose a divisor.")
        if num_experts % ep_size:
            found.append(
                f"ep_size is {ep_size}, which does not divide the {num_experts} experts of {preset}; choose a divisor."
            )
        return found

    @property
    def ep_rank(self) -> int:
        """Rank in the expert-parallel group."""
        return self.rank % self.ep_size

    @property
    def experts_per_rank(self) -> int:
        """Experts of each layer on this rank."""
        return self.num_experts // self.ep_size

    def expected_ranks(self, choices: int) -> float:
        """Ranks that hold the experts of a token, in the mean over all sets of so many of a layer's experts."""
        elsewhere = math.comb(self.num_experts - self.experts_per_rank, choices)
        return self.ep_size * (1 - elsewhere / math.comb(self.num_experts, choices))

    @property
    def first_expert(self) -> int:
        """Id in the model of this rank's first expert."""
        return self.ep_rank * self.experts_per_rank

    @property
    def expert_ids(self) -> range:
        """Ids in the model of this rank's experts."""
        return range(self.first_expert, self.first_expert + self.experts_per_rank)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same experts: the size of the expert-data-parallel group."""
        return self.world_size // self.ep_size

    @property
    def replica(self) -> int:
        """Rank in the expert-data-parallel group."""
        return self.rank // self.ep_size

    @property
    def replica_stride(self) -> int:
        """Distance between two ranks of the expert-data-parallel group."""
        return self.ep_size
