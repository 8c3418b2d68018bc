"""A Hugging Face directory of a class in the table of architectures, read under plain names.

Only the files' headers are read at first. A plain tensor is a stretch of one of theirs, which is mapped, so a rank
reads the ranges that it asks for, of stacked experts too. No code of the directory is run, and no pickle opened.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megamoe.config.model import ModelConfig
from megamoe.formats.architectures import Architecture
from megamoe.formats.config_json import OWN
from megamoe.formats.plain_files import FLOATS, Stored, StoredWeights, open_unquantised, weight_files
from megamoe.formats.tensor_names import Place, mtp_copies, places, plain_shapes
from megamoe.model.names import EMBEDDING, HEAD, is_buffer
from megamoe.utils.errors import Problems, UserError, shown
from megamoe.utils.json_files import read_json


def is_native(directory: Path) -> bool:
    """Whether a directory is to be read by the table: its config.json names a class that is not megamoe's own. Raises
    UserError."""
    path = directory / "config.json"
    return path.is_file() and read_json(path).get("architectures") != [OWN]


class NativeFiles(StoredWeights):
    """Weights of a class of transformers, with its balancing biases, under plain names."""

    def __init__(self, directory: Path, architecture: Architecture, config: ModelConfig):
        """Raises UserError for weights that are not in safetensors, or not those of a model of `config`."""
        files = weight_files(directory, ".safetensors")
        if not files:
            pickles = sorted(directory.glob("*.bin"))
            raise UserError(
                f"{directory} holds {f'{pickles[0].name}, a pickle, and ' if pickles else ''}no .safetensors; give one "
                "that holds the weights as safetensors."
            )
        tensors = open_unquantised(files, directory)
        beyond = f"model.layers.{config.num_hidden_layers}."
        if architecture.mtp and any(name.startswith(beyond) for name in tensors):
            config = config.model_copy(update={"num_nextn_predict_layers": 1})
        found = _find(architecture, config, tensors, directory)
        shapes = plain_shapes(architecture, config)
        shapes[HEAD] = shapes[EMBEDDING]
        super().__init__(tensors, found, shapes)

    @property
    def dtype(self) -> torch.dtype:
        """Of all weights; fp32 where they differ."""
        dtypes = {FLOATS[self._tensors[self._places[name].tensor].dtype] for name in self.shapes}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32


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
    strangers = sorted(tensors.keys() - known)
    if strangers and not problems:
        problems["has"] = (
            f"{directory} has {shown(strangers[0])}, for which the model of its config.json has "
            "no place; give a directory as it was published."
        )
    Problems(problems.values()).refuse()
    return found
