"""Communication of a training step, by arithmetic: every collective with its payload, its way and its time.

Payload is the buffer that one rank hands to the collective or, from an all-gather, gets. What of it a rank sends over
the links inside its node and between nodes follows from algorithms that take each node as one (reduce or gather inside,
exchange between nodes, every rank with its share of the node's network), as NCCL's do with one adapter per GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from megamoe.model.decoder import loss_parts
from megamoe.model.margins import BINS
from megamoe.planning.sharding import Group, Setup, elements_touched, parameter_groups
from megamoe.training.collectives import Collectives
from megamoe.training.step_sums import SCALARS
from megamoe.utils.data_sheets import Device

# Seconds that a collective takes whatever its size, inside a node and over several: assumed, of the order that is
# usual for the smallest messages.
LATENCY_INSIDE, LATENCY_BETWEEN = 15e-6, 40e-6

PhaseName = Literal["forward", "backward", "reduction", "reduction of experts", "update"]


@dataclass(frozen=True)
class Collective:
    """All calls in one step that serve one purpose."""

    purpose: str
    kind: str  # as in `training/collectives.py`
    ranks: int  # of the group
    stride: int  # between neighbours of the group
    calls: int
    payload: int  # bytes on this rank, all calls together
    phase: PhaseName  # of the step; a "reduction" may hide behind backward
    is_hidden: bool = False  # behind what a layer computes meanwhile, where that takes as long

    def nodes(self, gpus_per_node: int) -> tuple[int, int]:
        """(members of the group in one node, nodes of the group)."""
        nodes = [rank * self.stride // gpus_per_node for rank in range(self.ranks)]
        return nodes.count(0), len(set(nodes))

    def sent(self, gpus_per_node: int) -> tuple[float, float]:
        """Bytes that a rank sends (inside its node, between nodes)."""
        members, nodes = self.nodes(gpus_per_node)
        if self.kind == "all_to_all":
            share = self.payload / self.ranks
            return share * (members - 1), share * (self.ranks - members)
        passes = 2 if self.kind == "all_reduce" else 1  # there, reduced; and back
        inside = passes * self.payload * (members - 1) / members
        return inside, passes * self.payload / members * (nodes - 1) / nodes

    def seconds(self, device: Device, gpus_per_node: int, link_efficiency: float) -> float:
        if self.ranks == 1:
            return 0.0
        inside, between = self.sent(gpus_per_node)
        latency = LATENCY_BETWEEN if self.nodes(gpus_per_node)[1] > 1 else LATENCY_INSIDE
        return (inside / device.inside + between / device.between) / link_efficiency + self.calls * latency


def collectives(setup: Setup) -> list[Collective]:
    """Every collective of one step: forward and backward passes and the optimizer's step. Exact in bytes if the experts
    get equally many rows from and on every rank; calls of the gradients are at the least."""
    m, groups = setup.model, parameter_groups(setup)
    per_router = m.num_local_experts * (1 + BINS * m.counts_margins) + 1  # loads, margins and entropy
    small = 8 * (SCALARS + 2 * (len(loss_parts(m)) + setup.num_sources) + len(m.sparse_blocks) * per_router)
    return [
        *(_of_rows(setup) if setup.ep_size > 1 else []),
        *_of_gradients(setup, groups),
        *_of_update(setup, groups),
        Collective("norm, loss, flags and expert loads", "all_reduce", setup.world_size, 1, 1, small, "update"),
    ]


def _of_rows(setup: Setup) -> list[Collective]:
    m, passes = setup.model, setup.accumulation
    rows = setup.weight_bytes * setup.sent_rows * m.hidden_size
    slots = 8 * setup.rows  # a weight in fp32 and a code

    def exchange(
        purpose: str, blocks: int, size: int, phase: PhaseName = "forward", is_hidden: bool = False
    ) -> Collective:
        calls = blocks * passes
        return Collective(purpose, "all_to_all", setup.ep_size, 1, calls, calls * size, phase, is_hidden)

    blocks = len(m.sparse_blocks)
    again = sum(block < setup.recompute_blocks for block in m.sparse_blocks)
    of_rows = blocks + again * (setup.recompute == "whole")  # or the rows are kept
    found = [
        exchange("rows per expert", blocks + again, 8 * (m.num_local_experts + setup.ep_size)),
        exchange("weights of rows, forward", of_rows, slots),
        exchange("rows to experts, forward", blocks, rows, is_hidden=True),
        exchange("rows from experts, forward", blocks, rows),  # nobody's backward pass needs them
        exchange("rows to experts, recomputed", of_rows - blocks, rows, "backward", is_hidden=True),
        exchange("rows from experts, backward", blocks, rows, "backward"),
        exchange("rows to experts, backward", blocks, rows, "backward", is_hidden=True),
        exchange("weights of rows, backward", blocks, slots, "backward"),
    ]
    return [one for one in found if one.calls]


def _split_over(setup: Setup) -> tuple[tuple[str, bool, int, int], ...]:
    """(whose, whether experts', ranks that share them out, stride of these), of both kinds of weights."""
    topology = setup.topology()
    experts = "experts", True, topology.replicas, topology.replica_stride
    return ("shared weights", False, setup.world_size, 1), experts


def _of_gradients(setup: Setup, groups: list[Group]) -> list[Collective]:
    found = []
    # ZeRO-2 reduces after every backward pass, ZeRO-1 once per step.
    reductions = setup.accumulation if setup.zero_stage == 2 else 1
    for whose, expert, ranks, stride in _split_over(setup):
        theirs = [group for group in groups if group.expert == expert]
        if setup.reduces_once:
            kind, calls, elements = "reduce_scatter", len(theirs), sum(group.partition * ranks for group in theirs)
        else:
            kind, elements = "all_reduce", sum(sum(group.sizes.values()) for group in theirs)
            calls = reductions * math.ceil(elements / setup.bucket)
            if not setup.all_reduce:
                kind, calls = "reduce", calls + reductions * (ranks - 1)
        payload = reductions * elements * setup.communication_bytes
        if setup.reduces(ranks):
            phase: PhaseName = "reduction of experts" if expert else "reduction"
            found.append(Collective(f"gradients of {whose}", kind, ranks, stride, calls, payload, phase))
    return found


def _of_update(setup: Setup, groups: list[Group]) -> list[Collective]:
    found = []
    if setup.offload and setup.check_overflow:
        found.append(Collective("overflow in any gradient", "all_reduce", setup.world_size, 1, 1, 1, "update"))
    for whose, expert, ranks, stride in _split_over(setup):
        theirs = [group for group in groups if group.expert == expert]
        if setup.offload:
            purpose, calls = ("norm of experts", len(theirs)) if expert else ("norm of the gradient", len(groups))
            found.append(Collective(purpose, "all_reduce", ranks, stride, calls, 4 * calls, "update"))
        sizes = [group.partition * group.ranks * setup.weight_bytes for group in theirs]
        if ranks > 1:
            found.append(Collective(f"updated {whose}", "all_gather", ranks, stride, len(sizes), sum(sizes), "update"))
        shares = [group.matrix_share(setup.topology()) for group in theirs if group.matrices]
        cut = [share for share in shares if share.is_cut]  # there and back
        if cut:
            purpose, calls = f"cut matrices of {whose}", 2 * len(cut)
            payload = 4 * sum(sum(share.sent) + sum(share.received) for share in cut)
            found.append(Collective(purpose, "all_to_all", ranks, stride, calls, payload, "update"))
    return found


def payload_of(setup: Setup) -> Counter[tuple[str, int]]:
    """Bytes of a step by kind of collective and ranks of its group."""
    payload: Counter[tuple[str, int]] = Counter()
    for one in collectives(setup):
        payload[one.kind, one.ranks] += one.payload
    return payload


def describe_traffic(found: Collectives, setup: Setup | None) -> str:
    """A table of the collectives of a step, by kind and ranks of the group.

    Args:
        found: the collectives of this rank, entered for each step.
        setup: to predict by; None predicts nothing.
    """
    lines = [f"collectives of a step on rank 0, means of {found.entered} steps; times are not measured"]
    lines.append(f"{'collective':16}{'ranks':>6}{'calls':>10}{'bytes':>20}{'predicted bytes':>20}")
    predicted = payload_of(setup) if setup else {}
    for key in sorted(found.calls.keys() | predicted.keys()):
        calls, size = found.calls[key] / found.entered, found.payload[key] / found.entered
        expected = f"{predicted.get(key, 0):,}" if setup else "-"
        lines.append(f"{key[0]:16}{key[1]:6}{calls:10,.1f}{size:20,.0f}{expected:>20}")
    return "\n".join(lines)


def update_bytes(setup: Setup, state_bytes: int) -> int:
    """Bytes that an update reads and writes for each weight of a rank's share: the gradient in fp32 for the norm,
    both ways to be clipped, and to be applied; master and state both ways; the master again, for the new weight, and
    once more for the average, with that both ways.

    Args:
        state_bytes: of the optimizer's state for the weight.
    """
    average = 2 * setup.average_bytes + 4 if setup.average_bytes else 0
    return 4 * 4 + 2 * (4 + state_bytes) + 4 + setup.weight_bytes + average


def host_transfers(setup: Setup) -> tuple[int, int]:
    """Bytes that the first rank sends to the host's memory and gets from it in a step."""
    if not setup.offload:
        return 0, 0
    groups = parameter_groups(setup)
    share = sum(group.partition for group in groups)
    sent, got = 4 * share, setup.weight_bytes * share  # gradients in fp32, updated weights
    if setup.sums_on_host:
        whole = setup.weight_bytes * elements_touched(setup, groups)
        sent, got = sent + setup.accumulation * whole, got + (setup.accumulation - 1) * whole
    return sent, got
