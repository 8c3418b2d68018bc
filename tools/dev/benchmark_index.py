"""Measure the index of a checkpoint of any number of ranks, and what a save and a resume touch, without those ranks.

    python tools/dev/benchmark_index.py --ranks 1024 --ep_size 64 --experts 128 --resume_on 512 --resume_ep_size 32

The slices are those that DeepSpeed's ZeRO gives each rank, by the arithmetic of `planning/sharding.py`; the hashes are
random. Prints bytes and seconds to write, to read and to send the index, and files and bytes of a rank.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megamoe.checkpoint import folders
from megamoe.checkpoint.index import (
    FileRecord,
    Index,
    OptimizerRecord,
    SchedulerPosition,
    SliceRecord,
    Topology,
    TrainingRecord,
    read_index,
    write_index,
)
from megamoe.checkpoint.slice_file import BLOCK_BYTES, TensorRecord, number_of_blocks
from megamoe.config import cli
from megamoe.config.model import ModelConfig, load_preset
from megamoe.config.optimizers import MASTERS
from megamoe.config.recipe import read_recipe
from megamoe.model.costs import parameter_shapes
from megamoe.model.names import engine_parameters, engine_shape, expert_id, plain_parts, stretches
from megamoe.model.topology import ExpertTopology
from megamoe.planning.sharding import Group, Setup, parameter_groups, read_setup
from megamoe.utils.errors import UserError

STATE = ("exp_avg", "exp_avg_sq")
VALUE_BYTES = 4


@dataclass(frozen=True)
class Range:
    """Values of a flattened parameter."""

    name: str
    start: int
    count: int


def slices_by_rank(setup: Setup) -> list[list[Range]]:
    """What each rank holds of each parameter."""
    groups, first = parameter_groups(setup), setup.topology().expert_ids
    held = {name: shape for name, shape in parameter_shapes(setup.model).items() if expert_id(name) in (None, *first)}
    shapes = {name: engine_shape(name, parts) for name, parts in engine_parameters(held).items()}
    return [list(_slices(setup.topology(rank), groups, shapes)) for rank in range(setup.world_size)]


def _slices(topology: ExpertTopology, groups: list[Group], shapes: dict[str, tuple[int, ...]]) -> Iterator[Range]:
    """
    Args:
        shapes: of the engine's parameters.
    """
    for group in groups:
        own = group.index(topology)
        for name, size in group.sizes.items():
            start = max(own * group.partition - group.starts[name], 0)
            count = group.owners(name).get(own, 0)
            if count and size:
                parts = plain_parts(name, shapes[name], topology.first_expert)
                yield from (Range(part.name, first, length) for part, first, length in stretches(parts, start, count))


def make_index(setup: Setup, run: dict[str, Any]) -> Index:
    """The index of a checkpoint that AdamW's run of this setup would save."""
    files = {}
    for rank, ranges in enumerate(slices_by_rank(setup)):
        total = sum(one.count for one in ranges)
        offsets = {kind: 4096 + number * total * VALUE_BYTES for number, kind in enumerate((MASTERS, *STATE))}
        slices = []
        for one in ranges:
            nbytes = one.count * VALUE_BYTES
            hashes = [os.urandom(32).hex() for _ in range(number_of_blocks(nbytes))]
            tensors = {kind: TensorRecord(dtype="float32", offset=offsets[kind], sha256=hashes) for kind in offsets}
            slices.append(SliceRecord(name=one.name, start=one.start, count=one.count, tensors=tensors))
            offsets = {kind: offset + nbytes for kind, offset in offsets.items()}
        files[folders.rank_file(rank)] = FileRecord(bytes=4096 + 12 * total, header=os.urandom(32).hex(), slices=slices)
    return Index(
        save_id="0" * 32,
        run_id="0" * 32,
        step=1000,
        parent=None,
        topology=Topology(world_size=setup.world_size, ep_size=setup.ep_size, zero_stage=setup.zero_stage),
        training=TrainingRecord(
            global_samples=0, skipped_steps=0, skipped_in_window=0, loss_scaler={},
            scheduler=SchedulerPosition(last_epoch=1000, step_count=1001),
        ),
        optimizer=OptimizerRecord(name="adamw", state=list(STATE), step=1000, step_dtype=None, groups=[]),
        run=run,
        shapes={name: list(shape) for name, shape in parameter_shapes(setup.model).items()},
        files=files,
    )  # fmt: skip


def slices_by_name(index: Index) -> dict[str, list[tuple[str, SliceRecord]]]:
    """The slices of each parameter, with the files that hold them."""
    held: dict[str, list[tuple[str, SliceRecord]]] = {}
    for file, record in index.files.items():
        for piece in record.slices:
            held.setdefault(piece.name, []).append((file, piece))
    return held


def files_and_bytes(held: dict[str, list[tuple[str, SliceRecord]]], wanted: list[Range]) -> tuple[int, int]:
    """Files that a rank opens, and bytes that it reads: each block, of every kind, that holds a value of its own."""
    files, total = set(), 0
    for one in wanted:
        for file, piece in held[one.name]:
            first = max(one.start - piece.start, 0) * VALUE_BYTES
            last = min(one.start + one.count - piece.start, piece.count) * VALUE_BYTES
            if first < last:
                files.add(file)
                end = min(number_of_blocks(last) * BLOCK_BYTES, piece.count * VALUE_BYTES)
                total += (end - first // BLOCK_BYTES * BLOCK_BYTES) * len(piece.tensors)
    return len(files), total


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(*args), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Measure the index of a checkpoint of any number of ranks.",
    )
    parser.add_argument("--preset", default="moe-680m", help="model")
    parser.add_argument("--experts", type=int, default=128, help="experts of a layer, instead of the preset's")
    parser.add_argument("--ds_config", default="ds_configs/zero2.json", help="DeepSpeed JSON")
    parser.add_argument("--ranks", type=int, default=1024, help="ranks that save")
    parser.add_argument("--ep_size", type=int, default=64, help="ranks that share one set of experts")
    parser.add_argument("--resume_on", type=int, help="ranks that resume; by default as many")
    parser.add_argument("--resume_ep_size", type=int, help="their ep_size; by default the same")
    args = parser.parse_args()
    model: ModelConfig = load_preset(args.preset).model_copy(update={"num_local_experts": args.experts})
    recipe = read_recipe(args.ds_config, args.ranks, on_cpu=False, auto="bf16")
    again, again_ep = args.resume_on or args.ranks, args.resume_ep_size or args.ep_size
    problems = [
        *ExpertTopology.problems(args.ep_size, args.experts, args.ranks, args.preset),
        *ExpertTopology.problems(again_ep, args.experts, again, args.preset),
    ]
    if problems:
        raise UserError(*problems)
    setup = read_setup(model, recipe, args.ep_size, model.max_position_embeddings, on_cpu=False)
    index = make_index(setup, {"model": model.model_dump(), "deepspeed": recipe.json})
    with tempfile.TemporaryDirectory() as folder:
        _, writing = timed(write_index, Path(folder), index)
        size = (Path(folder) / "index.json").stat().st_size
        read, reading = timed(read_index, Path(folder))
    wanted = slices_by_rank(replace(setup, world_size=again, ep_size=again_ep))
    pickled, sharing = timed(pickle.dumps, read)
    _, receiving = timed(pickle.loads, pickled)
    held = slices_by_name(read)
    opened, read_by_rank = zip(*(files_and_bytes(held, ranges) for ranges in wanted), strict=True)
    slices = sum(len(record.slices) for record in index.files.values())
    print(
        f"{args.ranks} ranks, ep_size {args.ep_size}, {args.experts} experts: {slices:,} slices in {args.ranks} files, "
        f"of {max(record.bytes for record in index.files.values()):,} bytes at most"
    )
    print(f"index: {size:,} bytes; written in {writing:.2f} s, read and checked in {reading:.2f} s")
    print(
        f"resumed on {again} ranks, ep_size {again_ep}: sent as {len(pickled):,} bytes, packed in {sharing:.2f} s and "
        f"unpacked in {receiving:.2f} s; a rank opens {statistics.median(opened):g} files in the median, {max(opened)} "
        f"at most, and reads at most {max(read_by_rank):,} bytes of them"
    )


if __name__ == "__main__":
    cli.run(main)
