"""Is a checkpoint what was saved? The one check for resuming, "done", converting and inspecting."""

from __future__ import annotations

from pathlib import Path

from megamoe.checkpoint import folders, indexed_files, universal
from megamoe.checkpoint.index import read_index, share_of
from megamoe.utils.errors import UserError


def problems(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What keeps a checkpoint from being what was saved, one sentence each, found by reading all of its bytes.

    Args:
        part: look at this share only, of `parts`; the shares together cover every file.
    """
    if not checkpoint.exists():
        return [f"{checkpoint} does not exist; check the path."]
    try:
        if folders.has_index(checkpoint):
            files = read_index(checkpoint).files
        elif (checkpoint / folders.MANIFEST).is_file():
            files = universal.read_manifest(checkpoint).files
        else:
            problem = incomplete(checkpoint)
            return [problem] if problem else []
    except UserError as error:
        return error.problems
    return indexed_files.problems(checkpoint, share_of(files, part, parts))


def incomplete(checkpoint: Path) -> str | None:
    """Why a folder without index and manifest is no checkpoint; None where megamoe has not written it, so that nothing
    can be verified. Raises UserError."""
    if not checkpoint.is_dir() or folders.is_complete(checkpoint):
        return None
    in_run = folders.step_of(checkpoint) is not None and folders.run_of(checkpoint) is not None
    universal_of_ours = (checkpoint / "run.json").is_file() and (checkpoint / universal.MAIN_FILE).is_file()
    if in_run or universal_of_ours or any(checkpoint.glob("rank_*.safetensors")):
        return f"{checkpoint} was not saved completely, for it has no {folders.INDEX}; use an older checkpoint."
    return None
