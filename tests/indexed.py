"""A small checkpoint, made without an engine, in megamoe's own form and as a Universal Checkpoint; damage to it."""

import json
import os
from pathlib import Path

import torch

from megamoe.checkpoint import folders
from megamoe.checkpoint.index import (
    FileRecord,
    FlatGroup,
    Index,
    OptimizerRecord,
    SchedulerPosition,
    Stretch,
    Topology,
    TrainingRecord,
    write_index,
    write_slices,
)
from megamoe.checkpoint.opening import open_source
from megamoe.checkpoint.slice_file import sha256
from megamoe.checkpoint.universal import write_universal

SHAPES = {"model.a.weight": (7, 5), "model.b.weight": (11,), "model.norm.weight": (3,)}
BIAS = "model.layers.0.moe.router.selection_bias"
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
RANKS = 2
RUN = {"preset": "made up"}


def values(name, kind, seed=0, shapes=SHAPES):
    """What `write` puts there, flat."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * [*shapes, BIAS].index(name) + len(kind))
    return torch.randn(torch.Size(shapes.get(name, (4,))).numel(), generator=generator)


def write(checkpoint: Path, seed=0, run_id=None, shapes=SHAPES, run=RUN) -> Index:
    """Save it as two ranks do that share each parameter; returns its index."""
    checkpoint.mkdir(parents=True)
    save_id = f"{seed:032x}"
    files = {}
    for rank in range(RANKS):
        pieces = [(name, _span(shape, rank), KINDS) for name, shape in shapes.items()]
        if rank == 0:
            pieces.append((BIAS, range(4), ("buffer",)))
        file = f"rank_{rank:05d}.safetensors"
        groups = [
            FlatGroup(
                {kind: values(name, kind, seed, shapes) for kind in kinds},
                [Stretch(name, shapes.get(name, (4,)), span.start, len(span), span.start)],
            )
            for name, span, kinds in pieces
        ]
        files[file] = write_slices(checkpoint / file, save_id, groups)
    script = b"print('a script')\n"
    (checkpoint / "zero_to_fp32.py").write_bytes(script)
    files["zero_to_fp32.py"] = FileRecord(bytes=len(script), sha256=sha256(script))
    index = Index(
        save_id=save_id,
        run_id=run_id,
        step=folders.step_of(checkpoint) or 0,
        parent=None,
        topology=Topology(world_size=RANKS, ep_size=1, zero_stage=2),
        training=TrainingRecord(
            global_samples=8, skipped_steps=1, skipped_in_window=0,
            scheduler=SchedulerPosition(last_epoch=2, step_count=3), loss_scaler={"cur_scale": 1.0, "dynamic": False},
        ),
        optimizer=OptimizerRecord(
            name="adamw", state=list(KINDS[1:]), step=2.0, step_dtype="float32", groups=[{"lr": 0.1}]
        ),
        run=run,
        shapes={**{name: list(shape) for name, shape in shapes.items()}, BIAS: [4]},
        files=files,
    )  # fmt: skip
    write_index(checkpoint, index)
    return index


def _span(shape, rank):
    count = torch.Size(shape).numel()
    middle = 2 * count // 3
    return range(middle) if rank == 0 else range(middle, count)


def write_both(folder: Path) -> dict[str, Path]:
    """The same checkpoint by form."""
    write(folder / "own" / "step_3")
    write_universal(open_source(folder / "own" / "step_3"), RUN, folder / "universal" / "step_3")
    return {form: folder / form / "step_3" for form in ("own", "universal")}


class Malicious:
    """Leaves a mark where it is unpickled without care."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def rewrite_index(checkpoint: Path, change) -> None:
    """Let `change` change the content of the index, and give it the hash that it then has."""
    path = checkpoint / "index.json"
    body = json.loads(path.read_text())["index"]
    body = change(body) or body
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({"sha256": sha256(text.encode()), "index": body}) + "\n")
