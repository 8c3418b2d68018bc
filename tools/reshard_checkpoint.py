"""Reshard a checkpoint for any number of ranks in advance: `python tools/reshard_checkpoint.py runs/a runs/b`.

runs/b is a run folder with the newest checkpoint of runs/a in DeepSpeed's Universal layout. `pretrain.py --run_dir
runs/b --resume` resumes from it, and DeepSpeed's own loader reads it at an ep_size of 1. A plain --resume reshards by
itself; this pays where a great many ranks would each have to look into every rank's file.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megamoe import cli
from megamoe.checkpoint import manifest
from megamoe.checkpoint.export import output, write_universal
from megamoe.checkpoint.reader import RankFiles, find_checkpoint, open_source
from megamoe.errors import UserError


def main() -> None:
    parser = cli.Parser(description="Reshard a checkpoint for any number of ranks.")
    parser.add_argument("checkpoint", type=Path, help="folder of a run, or of one checkpoint")
    parser.add_argument("out", type=Path, help="run folder to make")
    args = parser.parse()
    checkpoint = find_checkpoint(args.checkpoint)
    source = open_source(checkpoint, open_files=1)
    if not isinstance(source, RankFiles):
        raise UserError(f"{checkpoint} fits any number of ranks as it is; there is nothing to reshard.")
    name = f"step_{source.training_state()['global_steps']}"
    run_dir = checkpoint.parent.parent
    with output(args.out) as partial:
        folder = partial / "checkpoints"
        write_universal(source, checkpoint, folder / name)
        for pointer in ("latest", "latest_universal"):  # the second is DeepSpeed's name for it
            manifest.replace_file(folder / pointer, name)
        for file in (checkpoint / "run.json", run_dir / "run.json", run_dir / "tokenizer.json"):
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
    folder = args.out / "checkpoints"
    print(f"wrote {folder / name} from {checkpoint}, saved by {source.world_size} ranks at ep_size {source.ep_size}")


if __name__ == "__main__":
    cli.run(main)
