"""What a step's cost follows from: ranks, batch, precision and ZeRO, and how the weights lie on a rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from megamoe.config.model import ModelConfig
from megamoe.config.optimizers import AVERAGE
from megamoe.config.recipe import DTYPES, Recipe
from megamoe.config.run import Recompute, RunConfig
from megamoe.data.batches import TrainData
from megamoe.model.costs import parameter_shapes
from megamoe.model.dispatch import CPU_ROW_MULTIPLE
from megamoe.model.grouped_gemm import Kernel
from megamoe.model.names import engine_parameters, expert_id, is_engine_expert, is_projection, is_undecayed
from megamoe.model.topology import ExpertTopology
from megamoe.training.matrix_share import MatrixShare, Run, Shape, place_of

# Elements per rank to which a flat group is rounded up (nccl_start_alignment_factor in stage_1_and_2.py).
FLAT_ALIGNMENT = 2
# Most elements of an expert group (max_group_size of split_params_into_different_moe_groups_for_optimizer).
EXPERT_GROUP = 178_956_971


@dataclass(frozen=True)
class Setup:
    """What decides the bytes and the communication of a step."""

    model: ModelConfig
    world_size: int
    ep_size: int
    micro_batch: int  # samples per rank and forward pass
    accumulation: int  # forward passes per step
    seq_len: int
    weight_bytes: int  # of a weight, an activation and a gradient
    state_bytes: int  # of the optimizer's state for a weight, besides its fp32 master and its average
    muon_bytes: int | None  # of a matrix of the blocks, where these have groups of their own; None where they have not
    sum_bytes: int  # of a gradient summed over micro-batches
    communication_bytes: int  # of a gradient while it is reduced
    zero_stage: int
    bucket: int  # elements of a reduction bucket
    overlap: bool  # two buckets instead of one
    all_reduce: bool  # gradients of several owners in one all-reduce, not a reduce to each
    offload: bool  # masters and optimizer state in the host's memory, the optimizer's step on its cores
    check_overflow: bool  # an offloaded optimizer asks all ranks for overflows before each step
    on_cpu: bool
    recompute_blocks: int = 0  # blocks of which backward recomputes the activations
    recompute: Recompute = "whole"  # what of them
    kernel: Kernel = "grouped_mm"  # of the experts' GEMMs
    compiled: bool = False  # regions of a block as one kernel each
    average_bytes: int = 0  # of the average of a weight
    num_sources: int = 0  # of samples whose losses are kept apart
    document_tokens: int | None = None  # of a document, where attention stays within one; None for whole samples
    imbalance: float = 1.0  # rows that reach this rank's experts, where ranks share them, over those under balance

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass on one rank."""
        return self.micro_batch * self.seq_len

    @property
    def rows(self) -> int:
        """Rows that experts get from a rank in one forward pass and layer; under balance, its own get as many."""
        return self.tokens * self.model.num_experts_per_tok

    @property
    def sent_rows(self) -> int:
        """Rows that a rank sends to the ranks of its tokens' experts in one forward pass and layer, those that stay
        included; as many arrive under balance, if every set of experts is as likely."""
        return round(self.tokens * self.topology().expected_ranks(self.model.num_experts_per_tok))

    @property
    def received(self) -> int:
        """Rows of this rank's experts in one forward pass and layer."""
        return self._at_fullest(self.rows, min(self.model.num_experts_per_tok, self.topology().experts_per_rank))

    @property
    def received_tokens(self) -> int:
        """Rows that reach this rank in one forward pass and layer, each for all of its experts that a token chose."""
        return self._at_fullest(self.sent_rows, 1)

    def _at_fullest(self, balanced: int, per_token: int) -> int:
        """How many come to this rank, if none of the ranks' tokens gives it more than `per_token`."""
        if self.ep_size == 1:
            return balanced
        return math.ceil(min(self.imbalance * balanced, self.ep_size * self.tokens * per_token))

    def topology(self, rank: int = 0) -> ExpertTopology:
        """The place of one rank."""
        return ExpertTopology(self.model.num_local_experts, self.ep_size, self.world_size, rank)

    @property
    def reduces_once(self) -> bool:
        """As `Recipe.reduces_once`."""
        return self.zero_stage == 1 and not self.offload

    def reduces(self, ranks: int) -> bool:
        """Whether gradients that so many ranks have go through a reduction: `training/zero_step.py` takes those of a
        single rank as they are."""
        return ranks > 1 or self.offload or not (self.all_reduce or self.reduces_once)

    def state_bytes_of(self, group: Group) -> int:
        """Of the optimizer's state for a weight of a group, besides its fp32 master."""
        return self.muon_bytes if group.matrices and self.muon_bytes is not None else self.state_bytes

    @property
    def sums_apart(self) -> bool:
        """Whether gradients of 16 bits are summed in fp32, in a partition of its own; elsewhere a rank keeps the whole
        gradient of every parameter that it owns a part of."""
        return self.sum_bytes > self.weight_bytes

    @property
    def sums_on_host(self) -> bool:
        """Whether gradients of several micro-batches are summed with a copy in the host's memory, one after the
        other."""
        return self.offload and self.zero_stage == 2 and self.accumulation > 1 and not self.sums_apart

    @property
    def places(self) -> int:
        """Places of rows at a layer's experts on this rank, fill included."""
        experts = self.topology().experts_per_rank
        if not self.on_cpu:
            return self.received
        if self.model.num_experts_per_tok == self.model.num_local_experts:
            return math.ceil(self.received / experts / CPU_ROW_MULTIPLE) * CPU_ROW_MULTIPLE * experts
        return self.received + (CPU_ROW_MULTIPLE - 1) // 2 * experts  # counts differ: the mean of the fill


def setup_problems(recipe: Recipe) -> list[str]:
    """What of a DeepSpeed JSON is not modelled, one sentence each."""
    zero = recipe.zero
    in_buckets = zero.stage == 1 and not recipe.reduces_once
    unmodelled = {
        "data_types.grad_accum_dtype": in_buckets and recipe.sum_dtype != recipe.dtype,
        "zero_optimization.reduce_scatter": in_buckets and not zero.reduce_scatter,
    }
    problems = [
        f"{recipe.where}: {key} is set to what the plan does not model; leave it out to plan without it."
        for key, is_set in unmodelled.items()
        if is_set
    ]
    if zero.reduce_bucket_size < 1:
        problems.append(f"{recipe.where}: zero_optimization.reduce_bucket_size is 0; give at least 1 element.")
    return problems


def read_setup(
    model: ModelConfig,
    recipe: Recipe,
    ep_size: int,
    seq_len: int,
    on_cpu: bool,
    averages: bool = False,
) -> Setup:
    """The setup of a run without recomputed or compiled blocks; its arguments must have passed the checks of a run."""
    zero, optimizer = recipe.zero, recipe.optimizer
    return Setup(
        model=model,
        world_size=recipe.world_size,
        ep_size=ep_size,
        micro_batch=recipe.micro_batch,
        accumulation=recipe.accumulation,
        seq_len=seq_len,
        weight_bytes=recipe.torch_dtype.itemsize,
        state_bytes=optimizer.state_bytes(False),
        muon_bytes=optimizer.state_bytes(True) if optimizer.splits_matrices else None,
        sum_bytes=DTYPES[recipe.sum_dtype].itemsize,
        communication_bytes=DTYPES[recipe.communication_dtype].itemsize,
        zero_stage=zero.stage,
        bucket=zero.reduce_bucket_size,
        overlap=zero.overlap_comm,
        all_reduce=zero.use_multi_rank_bucket_allreduce,
        offload=zero.offloads_optimizer,
        check_overflow=recipe.checks_overflow,
        on_cpu=on_cpu,
        average_bytes=AVERAGE.dtype.itemsize if averages else 0,
    )


def setup_of(run: RunConfig, model: ModelConfig, recipe: Recipe, data: TrainData) -> Setup | None:
    """What the traffic of a run's steps follows from; None where they differ, or are not modelled."""
    phase, *others = data.phases.all
    if others or setup_problems(recipe):
        return None
    setup = read_setup(model, recipe, run.ep_size, phase.seq_len, recipe.on_cpu)
    setup = replace(setup, recompute_blocks=run.recompute_blocks, recompute=run.recompute)
    sources = len(data.source_names)
    return replace(setup, micro_batch=phase.micro_batch, accumulation=phase.accumulation, num_sources=sources)


# --- weights and their groups ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Parameters that DeepSpeed flattens together and splits evenly over `ranks` data-parallel ranks."""

    sizes: dict[str, int]  # elements on this rank, by the engine's name, in the order of the flat tensor
    ranks: int
    expert: bool
    matrices: tuple[Shape, ...] = ()  # in the order of the flat tensor, each expert's own, where Muon takes them

    @cached_property
    def partition(self) -> int:
        """Elements of one rank's share, the fill of the last included."""
        alignment = FLAT_ALIGNMENT * self.ranks
        return math.ceil(sum(self.sizes.values()) / alignment) * alignment // self.ranks

    @cached_property
    def starts(self) -> dict[str, int]:
        """Where each parameter begins in the flat tensor."""
        return dict(zip(self.sizes, itertools.accumulate(self.sizes.values(), initial=0), strict=False))

    def index(self, topology: ExpertTopology) -> int:
        """Rank in the data-parallel group."""
        return topology.replica if self.expert else topology.rank

    def matrix_share(self, topology: ExpertTopology) -> MatrixShare:
        """Which of `matrices` are on a rank."""
        return MatrixShare(list(self.matrices), self.partition, self.index(topology), self.ranks)

    def batches(self, topology: ExpertTopology) -> list[Run]:
        """The matrices that Muon orthogonalizes at once on a rank; one that is cut by itself."""
        share = self.matrix_share(topology)
        return [*share.whole, *([share.tail] if share.tail else [])]

    def owners(self, name: str) -> dict[int, int]:
        """Elements of a parameter that fall into each rank's share, by index in the data-parallel group."""
        start, share = self.starts[name], self.partition
        end = start + self.sizes[name]
        return {
            rank: min(end, (rank + 1) * share) - max(start, rank * share)
            for rank in range(start // share, (end - 1) // share + 1)
        }


def elements_touched(setup: Setup, groups: list[Group], rank: int = 0) -> int:
    """Elements of all parameters of which `rank` owns a part."""
    topology = setup.topology(rank)
    return sum(
        size for group in groups for name, size in group.sizes.items() if group.index(topology) in group.owners(name)
    )


def parameter_groups(setup: Setup) -> list[Group]:
    """The groups that `engine.parameter_groups` makes, as the first rank holds them."""
    return list(_groups(setup.model, setup.topology(), EXPERT_GROUP, setup.muon_bytes is not None))


@lru_cache  # a search asks for the same ones hundreds of times
def _groups(model: ModelConfig, topology: ExpertTopology, largest: int, muon: bool) -> tuple[Group, ...]:
    """
    Args:
        largest: elements of an expert group at the most.
        muon: whether the matrices of the blocks have groups of their own.
    """
    here = set(topology.expert_ids)
    held = {
        name: shape
        for name, shape in parameter_shapes(model).items()
        if (expert := expert_id(name)) is None or expert in here
    }
    parameters = engine_parameters(held)
    sizes = {name: sum(part.count for part in parts) for name, parts in parameters.items()}
    shared: dict[str, int] = {}
    undecayed: dict[str, int] = {}
    matrices: dict[str, int] = {}
    experts: list[dict[str, int]] = []
    for name, size in sizes.items():
        if not is_engine_expert(name):
            (matrices if muon and is_projection(name) else undecayed if is_undecayed(name) else shared)[name] = size
        elif experts and sum(experts[-1].values()) + size <= largest:
            experts[-1][name] = size
        else:
            experts.append({name: size})

    matrices = dict(sorted(matrices.items(), key=lambda one: place_of(parameters[one[0]][0].shape)))

    def shapes(names: Iterable[str]) -> tuple[Shape, ...]:
        parts = [part for name in names for part in parameters[name]] if muon else []
        return tuple((part.shape[0], part.shape[1]) for part in parts)

    world = topology.world_size
    return (
        Group(shared, world, False),
        Group(undecayed, world, False),
        *([Group(matrices, world, False, shapes(matrices))] if matrices else []),
        *(Group(piece, topology.replicas, True, shapes(piece)) for piece in experts),
    )
