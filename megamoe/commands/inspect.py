"""Look into a checkpoint: its origin, its size, whether it is damaged, and the norm of each expert's weights."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from megamoe.checkpoint import folders, verify
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.checkpoint.opening import open_source, run_record
from megamoe.commands.options import Inspect
from megamoe.formats.plain_files import STATE_DICT_ENDINGS
from megamoe.formats.source import Source, read_whole
from megamoe.formats.unpickle import safe_load
from megamoe.model.names import split_expert
from megamoe.utils.errors import Problems, UserError


def print_files(checkpoint: Path) -> None:
    """Bytes by kind of file, and whether they are what was saved. Raises UserError if they are not."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for path in sorted(path for path in [checkpoint, *checkpoint.rglob("*")] if path.is_file()):
        parts = path.relative_to(checkpoint).parts or [path.name]
        kinds[re.sub(r"(?<=_)\d+", "N", parts[0])].append(path.stat().st_size)
    print(f"size: {sum(map(sum, kinds.values())):,} bytes")
    for kind, sizes in kinds.items():
        print(f"  {len(sizes):5d} x {kind}: {sum(sizes):,} bytes")
    damaged = verify.problems(checkpoint) or unsafe_problems(checkpoint)
    if damaged:
        print("files: DAMAGED")
        raise UserError(*damaged)
    sealed = folders.is_complete(checkpoint)
    print("files: verified" if sealed else "files: safe to open; nothing says what bytes they should have")


def unsafe_problems(checkpoint: Path) -> list[str]:
    """What would run code if it were opened by a loader that trusts it: each pickled file is opened by one that does
    not."""
    problems = Problems()
    for path in [path for path in sorted(checkpoint.rglob("*")) if path.suffix in STATE_DICT_ENDINGS]:
        problems.attempt(safe_load, path)
    return problems


def print_origin(checkpoint: Path, source: Source) -> None:
    if isinstance(source, IndexedFiles):
        saved_on = source.index.topology
        print(f"topology: {saved_on.world_size} ranks, ep_size {saved_on.ep_size}, ZeRO-{saved_on.zero_stage}")
    else:
        print("topology: any (Universal layout)" if source.has_optimizer else "topology: any (weights alone)")
    if source.has_optimizer:
        state = source.training_state()
        print(f"step: {state['global_steps']} ({state['skipped_steps']} skipped)")
    record = run_record(checkpoint)
    if record:
        versions = ", ".join(f"{name} {number}" for name, number in record.get("versions", {}).items())
        print(f"run: preset {record.get('preset')}, seed {record.get('seed')}; {versions}")
        print(f"tokenizer: {record.get('tokenizer_sha256')}")
        print_history(record)
    print(f"parameters: {sum(math.prod(shape) for shape in source.shapes.values()):,}")


def print_history(record: dict[str, Any]) -> None:
    """Which data the steps of a run have read, before a resume with other data too."""
    begun = 1
    for part in [*record.get("replaced_data", []), record]:
        last, phases = part.get("last_step", math.inf), part.get("phases", [])
        for phase, following in itertools.zip_longest(phases, phases[1:]):
            first = max(phase["first_step"], begun)
            is_read = first <= last and (following is None or first < following["first_step"])
            for corpus in phase["data"] if is_read else ():
                sizes = f"{phase['samples_per_step']} x {phase['seq_len']}"
                print(f"data from step {first} on, {sizes}: {corpus['path']}, {corpus['fingerprint']}")
        begun = last + 1


def print_norms(source: Source) -> None:
    """L2 norm of each expert's weights: a row for each layer, a column for each expert."""
    squares: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for name in source.shapes:
        parts = split_expert(name)
        if parts:
            squares[parts.layer][parts.expert] += read_whole(source, name).square().sum().item()
    print("norms of the experts' weights, by layer:")
    for layer in sorted(squares, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]):
        print(f"  {layer:24s}" + "".join(f"{squares[layer][expert] ** 0.5:9.3f}" for expert in sorted(squares[layer])))


def inspect(options: Inspect) -> None:
    found = folders.found_at(options.checkpoint)
    checkpoint = next(filter(folders.is_complete, found), found[0])
    for newer in found[: found.index(checkpoint)]:
        print(folders.passed_over(newer, verify.problems(newer)))
    if not checkpoint.exists():
        raise UserError(f"{checkpoint} does not exist; give a run folder or a checkpoint.")
    print(checkpoint)
    print_files(checkpoint)
    source = open_source(checkpoint)
    print_origin(checkpoint, source)
    print_norms(source)
