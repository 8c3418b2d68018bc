"""Write a model's weights in the forms others read, shard by shard, from any source.

    write_state_dict    one .pt file: torch.load(FILE, weights_only=True)
    write_safetensors   one .safetensors file, or a folder of shards with the usual index
    write_huggingface   a folder for AutoModelForCausalLM.from_pretrained(FOLDER), of a class of transformers or with
                        megamoe's own code (trust_remote_code=True)

An output is complete or absent.
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

import megamoe
from megamoe.config.model import ModelConfig
from megamoe.formats.architectures import BIAS, Architecture
from megamoe.formats.config_json import OWN, TRAINING_ONLY, nearest, write_config
from megamoe.formats.source import Source, View, read_whole
from megamoe.formats.tensor_names import written_names
from megamoe.formats.tokenizer_files import TOKEN_IDS, write_generation_config, write_tokenizer
from megamoe.model.costs import parameter_shapes
from megamoe.model.names import MTP, is_buffer
from megamoe.utils.disk import output
from megamoe.utils.errors import UserError, shown
from megamoe.utils.json_files import write_json


class Entry(NamedTuple):
    """One tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def entries(source: Source, dtype: torch.dtype) -> list[Entry]:
    """All tensors of the model, in the order of its layers. Router statistics stay fp32: a bias in bf16 would send
    tokens to other experts."""
    found = [Entry(name, shape, dtype) for name, shape in source.shapes.items()]
    found += [Entry(name, tuple(tensor.shape), torch.float32) for name, tensor in source.buffers.items()]
    return sorted(found, key=lambda entry: _by_number(entry.name))


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def shards(all_entries: list[Entry], most_bytes: int) -> list[list[Entry]]:
    """The entries in groups of at most `most_bytes`, or of a single larger one."""
    groups: list[list[Entry]] = [[]]
    held = 0  # bytes, in the last group
    for entry in all_entries:
        if groups[-1] and held + entry.nbytes > most_bytes:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += entry.nbytes
    return groups


def read_entry(source: Source, entry: Entry) -> Tensor:
    """The tensor itself. From a checkpoint, it is the fp32 master rounded to the entry's dtype. Raises UserError where
    that cannot hold it."""
    if entry.name in source.buffers:
        return source.buffers[entry.name].clone()
    tensor = rounded(read_whole(source, entry.name), entry.dtype, entry.name)
    return tensor.clone() if tensor.dtype == torch.float32 else tensor  # not a view of the mapped file


def rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """fp32 values of a tensor in a dtype. Raises UserError where one is beyond it."""
    found = values.to(dtype)
    if dtype != torch.float32 and not torch.equal(found.isfinite(), values.isfinite()):
        raise UserError(f"{name} has values that {dtype} cannot hold; use --dtype bf16 or fp32.")
    return found


def write_state_dict(source: Source, out: Path, dtype: torch.dtype) -> None:
    """One file that torch.load opens with weights_only; all of it is in memory before it is written."""
    with output(out) as partial:
        state = {entry.name: read_entry(source, entry) for entry in entries(source, dtype)}
        torch.save(state, partial)


def write_safetensors(source: Source, out: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """One file if `out` ends in .safetensors, else a folder of files of at most `shard_bytes` each."""
    with output(out) as partial:
        if out.suffix == ".safetensors":
            _save_shard(source, entries(source, dtype), partial)
        else:
            partial.mkdir()
            save_shards(source, partial, dtype, shard_bytes)


def save_shards(source: Source, folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    groups = shards(entries(source, dtype), shard_bytes)
    if len(groups) == 1:
        _save_shard(source, groups[0], folder / "model.safetensors")
        return
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _save_shard(source, group, folder / name)
        weight_map.update({entry.name: name for entry in group})
    total = sum(entry.nbytes for group in groups for entry in group)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _save_shard(source: Source, group: list[Entry], path: Path) -> None:
    save_file({entry.name: read_entry(source, entry) for entry in group}, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private


def write_huggingface(
    source: Source,
    out: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    config: ModelConfig,
    tokenizer: Path | None,
    keep_mtp: bool = False,
    architecture: Architecture | None = None,
) -> None:
    """A Hugging Face directory: weights, configuration and, where it is known, the tokenizer.

    Args:
        keep_mtp: write the weights of multi-token prediction too, of which transformers makes no use.
        architecture: the class of transformers that it is of; without one it brings its own code.
    """
    values = write_config(architecture, config, keep_mtp) if architecture else huggingface_config(config, keep_mtp)
    with output(out) as partial:
        partial.mkdir()
        ids = dict.fromkeys(TOKEN_IDS) | (write_tokenizer(partial, tokenizer, config) if tokenizer else {})
        write_json(partial / "config.json", {**values, "dtype": str(dtype).removeprefix("torch."), **ids})
        write_generation_config(partial, ids)
        for file in () if architecture else own_code():
            shutil.copyfile(file, partial / file.name)
        save_shards(huggingface_view(source, config, keep_mtp, architecture), partial, dtype, shard_bytes)


def own_code() -> list[Path]:
    """`modeling_megamoe.py` and the files that it imports next to itself, there in one folder, here in two."""
    model, here = Path(megamoe.__file__).parent / "model", Path(__file__).parent / "huggingface"
    files = [here / "modeling_megamoe.py"]
    for file in files:  # which grows
        names = re.findall(r"^from \.(\w+) import", file.read_text(), re.MULTILINE)
        beside = [here / f"{name}.py" if (here / f"{name}.py").is_file() else model / f"{name}.py" for name in names]
        files += [one for one in beside if one not in files]
    return files


def huggingface_view(source: Source, config: ModelConfig, keep_mtp: bool, architecture: Architecture | None) -> View:
    """The tensors of a Hugging Face directory under their names there. A head that is the embedding is left out, and a
    model without balancing biases has zeros where the class has biases."""
    if architecture:
        names = written_names(architecture, config, keep_mtp)
    else:
        held = [*(source.shapes.keys() & parameter_shapes(config).keys()), *source.buffers]
        names = {name: name for name in held if keep_mtp or not name.startswith(MTP)}
    zeros = torch.zeros(config.num_local_experts)
    buffers = {name: source.buffers.get(plain, zeros) for name, plain in names.items() if is_buffer(plain)}
    return View(source, {name: plain for name, plain in names.items() if name not in buffers}, buffers)


def huggingface_config(config: ModelConfig, keep_mtp: bool = False) -> dict[str, Any]:
    """config.json of an exported model; what only training needs is left out."""
    fields = config.model_dump(exclude={"rope_theta", "rope_scaling"} | TRAINING_ONLY, exclude_none=True)
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    return {
        "architectures": [OWN],
        "auto_map": {
            "AutoConfig": "configuration_megamoe.MegaMoeConfig",
            "AutoModel": "modeling_megamoe.MegaMoeModel",
            "AutoModelForCausalLM": f"modeling_megamoe.{OWN}",
        },
        "model_type": "megamoe",
        "rope_parameters": rope,
        **fields,
        "num_nextn_predict_layers": config.num_nextn_predict_layers if keep_mtp else 0,
    }


def native_class(source: Source, config: ModelConfig, keep_mtp: bool = False) -> tuple[Architecture | None, str]:
    """The class of transformers that holds the model, and a sentence that says which, or why none does.

    Args:
        keep_mtp: multi-token prediction, where the model has it, must have a place too.
    """
    architecture, fields = nearest(config)
    if fields:
        held = ", ".join(f"{name} {shown(getattr(config, name))}" for name in fields)
        return None, f"no class of transformers holds the model: {architecture.name} is the nearest, but for {held}"
    largest = max((bias.abs().max().item() for name, bias in source.buffers.items() if name.endswith(BIAS)), default=0)
    if largest and not architecture.has_bias:
        return None, (
            f"{architecture.name} holds the model but for its balancing bias, which is up to {largest:.2g} "
            "(router_bias), and no other class of transformers does"
        )
    if keep_mtp and config.num_nextn_predict_layers and not architecture.mtp:
        return None, (
            f"{architecture.name} holds the model but for its multi-token prediction (num_nextn_predict_layers), which "
            "--keep_mtp keeps"
        )
    return architecture, f"the model is one of transformers: {architecture.name}"
