"""A Hugging Face directory of a class in the table of architectures, read under plain names.

Only the files' headers are read at first. A plain tensor is a stretch of one of theirs, which is mapped, so a rank
reads the ranges that it asks for, of stacked experts too. No code of the directory is run, and no pickle opened.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megamoe.config.model import ModelConfig
from megamoe.config.optimizers import MASTERS
from megamoe.formats.architectures import Architecture
from megamoe.formats.config_json import OWN, read_directory
from megamoe.formats.plain_files import Stored, open_safetensors
from megamoe.formats.source import WeightsAlone
from megamoe.formats.tensor_names import Place, mtp_copies, places, plain_shapes
from megamoe.model.names import EMBEDDING, HEAD, MTP, is_buffer
from megamoe.utils.errors import UserError, shown
from megamoe.utils.json_files import read_json

DTYPES = ("F64", "F32", "F16", "BF16")
UNUSED = re.compile(r".*\.rotary_emb\.inv_freq")  # older files have them; they follow from the configuration
QUANTISED = re.compile(r".*\.(qweight|qzeros|scales|g_idx|weight_scale|weight_scale_inv|absmax|quant_map)")


def is_native(directory: Path) -> bool:
    """Whether a directory is to be read by the table: its config.json names a class that is not megamoe's own. Raises
    UserError."""
    path = directory / "config.json"
    return path.is_file() and read_json(path).get("architectures") != [OWN]


class NativeFiles(WeightsAlone):
    """Weights of a class of transformers, with its balancing biases, under plain names."""

    def __init__(self, directory: Path, files: list[Path]):
        """Raises UserError for what the table does not know, or does not agree with the directory's config.json."""
        architecture, config = read_directory(directory)
        self._tensors = {name: stored for file in files for name, stored in open_safetensors(file).items()}
        _check_dtypes(self._tensors, directory)
        if architecture.mtp and any(place.tensor in self._tensors for place in _mtp_places(architecture, config)):
            config = config.model_copy(update={"num_nextn_predict_layers": 1})
        found = _find(architecture, config, self._tensors, directory)
        shapes = plain_shapes(architecture, config)
        shapes[HEAD] = shapes[EMBEDDING]
        self._places = {name: place for name, place in found.items() if not is_buffer(name)}
        self.shapes = {name: shapes[name] for name in self._places}
        self.buffers = {name: self._stretch(found[name], shapes[name][0]) for name in found if is_buffer(name)}

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        assert kind == MASTERS
        place = self._places[name]
        return self._stretch(replace(place, start=place.start + start), count)

    def _stretch(self, place: Place, count: int) -> Tensor:
        return self._tensors[place.tensor].get().flatten()[place.start : place.start + count].float()


def _check_dtypes(tensors: dict[str, Stored], directory: Path) -> None:
    for name, stored in tensors.items():
        if stored.dtype not in DTYPES or QUANTISED.fullmatch(name):
            raise UserError(
                f"{directory}: {name} ({stored.dtype}) belongs to quantised weights; give the directory of the "
                "unquantised ones."
            )


def _mtp_places(architecture: Architecture, config: ModelConfig) -> list[Place]:
    found = places(architecture, config.model_copy(update={"num_nextn_predict_layers": 1}))
    return [found[f"{MTP}{name}"][0] for name in architecture.mtp]


def _find(
    architecture: Architecture, config: ModelConfig, tensors: dict[str, Stored], directory: Path
) -> dict[str, Place]:
    """Where each plain tensor is. Raises UserError for one that is missing, has another shape, or has no plain name."""
    found: dict[str, Place] = {}
    problems: dict[str, str] = {}  # one of each kind, for one cause makes many
    expected = places(architecture, config)
    if HEAD in tensors and config.tie_word_embeddings:  # the embedding once more
        expected[HEAD] = [Place(HEAD, expected[EMBEDDING][0].shape)]
    for name, candidates in expected.items():
        place = next((one for one in candidates if one.tensor in tensors), None)
        if place is None:
            if not is_buffer(name):  # a bias that is missing begins at 0
                problems.setdefault("lacks", f"{directory} lacks {candidates[0].tensor}; fetch the directory again.")
            continue
        shape = tensors[place.tensor].shape
        if shape != place.shape:
            problems.setdefault(
                "shape",
                f"{directory}: {place.tensor} has the shape {shape}, but by config.json it is {place.shape}; one of "
                "the two is of another model.",
            )
        found[name] = place
    known = {place.tensor for place in found.values()}
    known |= mtp_copies(config).keys() if config.num_nextn_predict_layers else set()
    strangers = sorted(name for name in tensors.keys() - known if not UNUSED.fullmatch(name))
    if strangers and not problems:
        problems["has"] = (
            f"{directory} has {shown(strangers[0])}{_and_more(strangers)}, which {architecture.name} as megamoe knows "
            "it has no place for; give a directory of that class as it was published."
        )
    if problems:
        raise UserError(*problems.values())
    return found


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
