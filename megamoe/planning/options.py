"""What a plan depends on beyond the run's own configuration. Imports no torch, so that --help comes at once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megamoe.config.cli import Options
from megamoe.config.run import ONE_WORD_EACH, CorpusOption
from megamoe.planning.rates import CPU, GPU
from megamoe.utils.data_sheets import DEVICES


class Assumptions(Options, group="Assumptions"):
    imbalance: float = Field(
        default=1.4,
        ge=1,
        description="rows at the experts of the fullest rank over the mean, for which memory is planned "
        "(1 + MaxVio, of which a balanced run's log says less than 0.4)",
    )
    efficiency: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description=f"share of the peak FLOP/s that the largest GEMMs reach (assumed: {GPU.gemms:g} on a GPU)",
    )
    link_efficiency: float = Field(
        default=GPU.links, gt=0, le=1, description="share of the links' rates that collectives reach (assumed)"
    )
    launch_us: float | None = Field(
        default=None,
        gt=0,
        description="microseconds that the host needs for an operator "
        f"(assumed: {1e6 * GPU.operator:g} for a GPU, {1e6 * CPU.operator:g} with the operator itself on CPU)",
    )
    document_tokens: int | None = Field(
        default=None, gt=0, description="tokens of a document, within which attention stays; by default whole samples"
    )


class PlanOptions(Assumptions):
    """What only a plan has, beyond the run's own configuration."""

    gpus: int = Field(gt=0, description="ranks, over all nodes")
    device: str = Field(default="h100", description=f"{', '.join(DEVICES)}, or cpu: this machine, all ranks on it")
    gpus_per_node: int = Field(default=8, gt=0, description="ranks whose links are those inside a node")
    micro_batch: int | None = Field(
        default=None, gt=0, description="samples per rank and forward pass; by default the DeepSpeed JSON's"
    )
    accumulation: int | None = Field(
        default=None, gt=0, description="forward passes per step and rank; by default the DeepSpeed JSON's"
    )
    steps: int | None = Field(default=None, gt=0, description="steps of the run; by default the schedule's")
    data: Annotated[list[CorpusOption], ONE_WORD_EACH] = Field(
        default=[], description="as for train: PATH or PATH=WEIGHT, of which the epochs are counted"
    )
    price_per_gpu_hour: float | None = Field(default=None, ge=0, description="for the cost of the run, in its currency")
    best: bool = Field(
        default=False,
        description="search for the micro-batch, accumulation, ep_size, recompute_blocks, recompute and ZeRO stage "
        "with most tokens/s",
    )
