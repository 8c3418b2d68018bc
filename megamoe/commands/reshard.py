"""Reshard a checkpoint for any number of ranks in advance: a run folder in DeepSpeed's Universal layout."""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import Field

from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.checkpoint.opening import find_checkpoint, open_source, run_record
from megamoe.checkpoint.universal import write_universal
from megamoe.config.cli import Options, Positional
from megamoe.utils import disk
from megamoe.utils.errors import UserError
from megamoe.utils.run_folder import TOKENIZER_FILES


class Reshard(Options):
    checkpoint: Positional[Path] = Field(description="folder of a run, or of one checkpoint")
    out: Positional[Path] = Field(description="run folder to make")


def reshard(options: Reshard) -> None:
    checkpoint = find_checkpoint(options.checkpoint)
    source = open_source(checkpoint)
    if not isinstance(source, IndexedFiles):
        raise UserError(f"{checkpoint} fits any number of ranks as it is; there is nothing to reshard.")
    saved_on, name = source.index.topology, f"step_{source.index.step}"
    run_dir = checkpoint.parent.parent
    with disk.output(options.out) as partial:
        folder = partial / "checkpoints"
        folder.mkdir(parents=True)
        write_universal(source, run_record(checkpoint), folder / name)
        for pointer in ("latest", "latest_universal"):  # the second is DeepSpeed's name for it
            disk.replace_file(folder / pointer, name)
        for file in ("run.json", "resumes.jsonl", *TOKENIZER_FILES):
            if (run_dir / file).is_file():
                shutil.copyfile(run_dir / file, partial / file)
    folder = options.out / "checkpoints"
    print(
        f"wrote {folder / name} from {checkpoint}, saved by {saved_on.world_size} ranks at ep_size {saved_on.ep_size}"
    )
