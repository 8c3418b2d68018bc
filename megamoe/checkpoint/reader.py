"""Read a model's weights and optimizer state by plain names, whatever wrote them and for however many ranks.

    IndexedFiles     what megamoe saves: each rank's slices of the fp32 masters and of the optimizer's state
    RankFiles        the same as DeepSpeed saves it
    UniversalFiles   DeepSpeed's Universal Checkpoint: a folder for each parameter
    PlainFiles       a state_dict, safetensors, a Hugging Face directory of megamoe's own class: weights alone
    NativeFiles      a Hugging Face directory of a class of transformers: weights alone

Only what is asked for is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megamoe.architectures.table import BIAS
from megamoe.checkpoint import folders, verify
from megamoe.checkpoint.deepspeed_files import MAIN_FILE, RankFiles, UniversalFiles
from megamoe.checkpoint.index import read_index
from megamoe.checkpoint.indexed_files import IndexedFiles
from megamoe.checkpoint.native_files import NativeFiles, is_native
from megamoe.checkpoint.plain_files import PlainFiles
from megamoe.config import ModelConfig
from megamoe.errors import UserError, shown
from megamoe.json_files import read_json
from megamoe.model.costs import parameter_shapes
from megamoe.model.names import (
    EMBEDDING,
    HEAD,
    MTP,
    expert_id,
    has_gates,
    layer_id,
    plain_name,
    plain_parts,
)
from megamoe.optimizers import MASTERS

OPTIONAL_PARTS = {  # the ends of names that a field adds
    "num_latent_tokens": (".latents",),
    "qk_norm": (".q_norm.weight",),
    "attention_bias": (".v_proj.bias", ".kv_a_proj_with_mqa.bias"),
    "attention_out_bias": (".o_proj.bias",),
    "kv_lora_rank": (".kv_b_proj.weight",),
    "q_lora_rank": (".q_b_proj.weight",),
    "n_shared_experts": (".shared_mlp.up_proj.weight",),
    "shared_expert_gate": (".shared_gate.weight",),
}
DENSE = ".mlp.up_proj.weight"  # the end of a name that each dense block has
PIECE = 2**24  # values that are compared at a time
STATE_DICT_ENDINGS = (".pt", ".pth", ".bin")


class Source(Protocol):
    """A model's weights, and where `has_optimizer` its training state, by plain names."""

    has_optimizer: bool
    state_names: tuple[str, ...]  # of the optimizer's state tensors that it holds; none before the first applied step
    shapes: dict[str, tuple[int, ...]]
    buffers: dict[str, Tensor]

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """`count` values of a flattened parameter from `start` on, (count,), often a view of a mapped file; `kind` is
        MASTERS or one of `state_names`."""

    def training_state(self) -> dict[str, Any]:
        """Of a source with optimizer: step counts, schedule, loss scale; optimizer_step is None where the optimizer
        counts none, or has applied none."""


# --- finding --------------------------------------------------------------------------------------------------------


def open_source(path: Path, open_files: int | None = None) -> Source:
    """Open a checkpoint folder, a file of plain weights, or a folder of them.

    The bytes of megamoe's own form are verified as they are read, those of others not at all. Raises UserError if it is
    none of these or cannot be read.
    """
    if folders.FILE.fullmatch(path.name) and path.is_file():
        raise UserError(f"{path} is one file of a checkpoint; give the folder, {path.parent}.")
    if path.is_file() and path.suffix in (".safetensors", *STATE_DICT_ENDINGS):
        return PlainFiles([path])
    if folders.has_index(path):
        return IndexedFiles(path, read_index(path))
    problem = verify.incomplete(path)
    if problem:
        raise UserError(problem)
    try:
        if (path / "zero").is_dir():
            return UniversalFiles(path)
        if (path / MAIN_FILE).is_file():
            return RankFiles(path, open_files)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is not laid out as DeepSpeed lays out a checkpoint with experts ({error!r}); give another."
        ) from None
    if path.is_dir() and is_native(path):
        return _native_source(path)
    for suffix in (".safetensors", ".bin"):
        if files := weight_files(path, suffix):
            return PlainFiles(files)
    raise UserError(
        f"{path} holds no checkpoint and no weights; give a run folder, a checkpoint in it, a .pt or .safetensors "
        "file, or a Hugging Face directory."
    )


def _native_source(directory: Path) -> Source:
    files = weight_files(directory, ".safetensors")
    if not files:
        pickles = sorted(directory.glob("*.bin"))
        raise UserError(
            f"{directory} holds {f'{pickles[0].name}, a pickle, and ' if pickles else ''}no .safetensors; give one "
            "that holds the weights as safetensors."
        )
    return NativeFiles(directory, files)


def weight_files(folder: Path, suffix: str) -> list[Path]:
    """The files of a Hugging Face directory's weights: those that the index names, where there is one. Raises UserError
    if one is missing or not in the folder."""
    for index in folder.glob(f"*{suffix}.index.json"):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index} has no weight_map of tensor names to file names; make or fetch it again.")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{index} names {shown(name)}, outside its folder; make or fetch it again.")
            if not os.path.isfile(folder / name):  # False for a name that no file can have, where pathlib raises
                raise UserError(f"{index} names {shown(name)}, which is missing beside it; bring it back.")
        return [folder / name for name in names]
    pattern = "pytorch_model*.bin" if suffix == ".bin" else f"*{suffix}"
    return sorted(file for file in folder.glob(pattern) if file.is_file())


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint in the run folder `path` of which every byte is what was saved, or `path` if it is one.

    Says in a line which newer ones were passed over. Raises UserError if none is verified.
    """
    found = folders.found_at(path)
    for checkpoint in found:
        problems = verify.problems(checkpoint)
        if not problems:
            return checkpoint
        if len(found) == 1:
            raise UserError(*problems)
        print(folders.passed_over(checkpoint, problems), flush=True)
    raise UserError(f"every checkpoint in {path} is damaged, as the lines above say; use another run folder.")


def run_record(checkpoint: Path) -> dict[str, Any]:
    """The record of the run that saved a checkpoint; empty where it is not known. Raises UserError."""
    if folders.has_index(checkpoint):
        return read_index(checkpoint).run
    path = checkpoint / "run.json"
    return read_json(path) if path.is_file() else folders.run_of(checkpoint) or {}


def model_problems(source: Source, config: ModelConfig, where: str) -> list[str]:
    """What keeps the parameters in `source` from being those of a model of `config`, a sentence for each field. Reads
    the head, where there is one that the model ties to the embedding."""
    problems = _size_problems(source, config, where) | _part_problems(source, config, where)
    if not problems:
        expected = parameter_shapes(config)
        beyond = {name for name in source.shapes.keys() - expected.keys() if not name.startswith(MTP)}  # not needed
        if config.tie_word_embeddings:
            beyond.discard(HEAD)
        for name in sorted([*(expected.keys() - source.shapes.keys()), *beyond])[:1]:
            what = "lacks" if name in expected else "has, beyond the model,"
            problems[name] = f"{where} {what} {name}; it is of another architecture."
    return list(problems.values())


def _size_problems(source: Source, config: ModelConfig, where: str) -> dict[str, str]:
    """Sentences by field, of sizes and of numbers of layers and experts."""
    problems: dict[str, str] = {}
    for name, shape in parameter_shapes(config).items():
        found = source.shapes.get(name)
        if found is None:
            continue
        if len(found) != len(shape):
            problems.setdefault(name, f"{where}: {name} has the shape {found}, not {tuple(shape.values())}.")
            continue
        if name.endswith(("q_norm.weight", "k_norm.weight")) and found != tuple(shape.values()):
            problems.setdefault(
                "qk_norm",
                f"{where}: {name} has {found[0]} numbers, not {sum(shape.values())}: another qk_norm, or other heads; "
                "use the same preset.",
            )
            continue
        for (field, size), other in zip(shape.items(), found, strict=True):
            if size != other:
                problems.setdefault(field, f"{where} was made with {field} {other}, not {size}; use the same preset.")
    for field, id_of in (("num_hidden_layers", layer_id), ("num_local_experts", expert_id)):
        ids = {id_of(name) for name in source.shapes} - {None}
        if len(ids) != getattr(config, field):
            problems.setdefault(
                field, f"{where} was made with {field} {len(ids)}, not {getattr(config, field)}; use the same preset."
            )
    return problems


def _part_problems(source: Source, config: ModelConfig, where: str) -> dict[str, str]:
    """Sentences by field, of what a model has or has not."""
    problems: dict[str, str] = {}
    expected = parameter_shapes(config)
    if has_gates(source.shapes) != config.gated_mlp:
        made, expects = ("true", "false") if has_gates(source.shapes) else ("false", "true")
        problems["gated_mlp"] = f"{where} was made with gated_mlp {made}, not {expects}; use the same preset."
    if config.tie_word_embeddings and not _is_tied(source):
        problems["tie_word_embeddings"] = (
            f"{where} was made with tie_word_embeddings false, not true: its {HEAD} is not the embedding; use the same "
            "preset."
        )
    if not config.tie_word_embeddings and HEAD not in source.shapes:
        problems["tie_word_embeddings"] = (
            f"{where} was made with tie_word_embeddings true, not false; use the same preset."
        )
    for field, ends in OPTIONAL_PARTS.items():
        is_there, is_expected = (any(name.endswith(ends) for name in names) for names in (source.shapes, expected))
        if is_there != is_expected:
            words = ("with", "without") if is_there else ("without", "with")
            problems[field] = f"{where} was made {words[0]} {field}, not {words[1]} it; use the same preset."
    if config.num_nextn_predict_layers and not any(name.startswith(MTP) for name in source.shapes):
        problems["num_nextn_predict_layers"] = (
            f"{where} was made without num_nextn_predict_layers, not with it; use the same preset."
        )
    held, wanted = _dense_blocks(source.shapes), _dense_blocks(expected)
    if held != wanted and len({layer_id(name) for name in source.shapes} - {None}) == config.num_hidden_layers:
        problems["first_k_dense_replace"] = (
            f"{where} was made with the dense blocks {held}, not {wanted} (first_k_dense_replace, mlp_only_layers); "
            "use the same preset."
        )
    return problems | _bias_problems(source, config, where)


def _dense_blocks(names: Iterable[str]) -> list[int]:
    return sorted(int(layer_id(name) or 0) for name in names if name.endswith(DENSE))


def _is_tied(source: Source) -> bool:
    """Whether the head is the embedding, by its values where the source has both."""
    shape = source.shapes.get(HEAD)
    if shape is None or shape != source.shapes.get(EMBEDDING):
        return shape is None
    count = math.prod(shape)
    return all(
        torch.equal(*(source.read(name, MASTERS, start, min(PIECE, count - start)) for name in (HEAD, EMBEDDING)))
        for start in range(0, count, PIECE)
    )


def _bias_problems(source: Source, config: ModelConfig, where: str) -> dict[str, str]:
    biased = any(
        name.endswith(BIAS) and not name.startswith(MTP) and bool(bias.any()) for name, bias in source.buffers.items()
    )
    if config.router_bias or not biased:
        return {}
    return {"router_bias": f"{where} has a balancing bias that is not zero, but router_bias is false; set it to true."}


# --- into a model ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_buffers(model: nn.Module, source: Source) -> None:
    """Give a model, or a rank's part of one, the router statistics in `source`."""
    for name, buffer in model.named_buffers():
        if plain_name(name) in source.buffers:
            buffer.copy_(source.buffers[plain_name(name)])


@torch.no_grad()
def load_weights(model: nn.Module, source: Source, dtype: torch.dtype) -> None:
    """Give a whole model (ep_size 1) the weights in `source`, in `dtype`, and the router statistics, in fp32."""
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=dtype)
        for part in plain_parts(name, tuple(parameter.shape)):
            values.view(-1)[part.start : part.start + part.count] = source.read(part.name, MASTERS, 0, part.count)
        parameter.data = values
    load_buffers(model, source)
