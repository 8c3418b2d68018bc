"""Write a model's weights in the forms others read, shard by shard, from any source.

    write_state_dict    one .pt file: torch.load(FILE, weights_only=True)
    write_safetensors   one .safetensors file, or a folder of shards with the usual index
    write_huggingface   a folder for AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True);
                        native_export.py writes the classes of transformers

Each writes to OUT.partial and renames it, so an output is complete or absent.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import megamoe
from megamoe.config.model import ModelConfig
from megamoe.config.optimizers import MASTERS
from megamoe.formats.config_json import OWN, TRAINING_ONLY
from megamoe.formats.source import Source
from megamoe.formats.tokenizer_files import write_generation_config, write_tokenizer
from megamoe.model.costs import parameter_shapes
from megamoe.model.names import MTP
from megamoe.utils import disk
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import write_json

HUGGINGFACE_FILES = (
    "formats/huggingface/attention_function.py",
    "formats/huggingface/configuration_megamoe.py",
    "formats/huggingface/modeling_megamoe.py",
    "model/attention.py",
    "model/feed_forward.py",
    "model/latent_attention.py",
    "model/rope.py",
    "model/router.py",
    "model/margins.py",
    "model/router_losses.py",
    "model/from_config.py",
)


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
    values = source.read(entry.name, MASTERS, 0, math.prod(entry.shape))
    tensor = rounded(values, entry.dtype, entry.name).view(entry.shape)
    return tensor.clone() if tensor.dtype == torch.float32 else tensor  # not a view of the mapped file


def rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """fp32 values of a tensor in a dtype. Raises UserError where one is beyond it."""
    found = values.to(dtype)
    if dtype != torch.float32 and not torch.equal(found.isfinite(), values.isfinite()):
        raise UserError(f"{name} has values that {dtype} cannot hold; use --dtype bf16 or fp32.")
    return found


def bytes_of_shard(gigabytes: float) -> int:
    """The option --max_shard_gb in bytes. Raises UserError."""
    if not 0 < gigabytes < math.inf:
        raise UserError(f"--max_shard_gb is {gigabytes}; give a finite size above 0.")
    return int(gigabytes * 1e9)


@contextlib.contextmanager
def output(out: Path) -> Iterator[Path]:
    """Where to write what becomes `out` once it is complete. Raises UserError if `out` exists."""
    disk.check_absent(out)
    partial = out.with_name(out.name + disk.PARTIAL)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        for path in [partial, *partial.rglob("*")]:
            disk.flush(path)
        os.replace(partial, out)
    except (SafetensorError, RuntimeError) as error:  # theirs and torch's form of an OSError
        raise UserError(f"{out} cannot be written ({error}); check that the disk has space.") from None
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
) -> None:
    """Weights, configuration, code and, where it is known, the tokenizer.

    Args:
        keep_mtp: write the weights of multi-token prediction too, for which the code has no use.
    """
    config = config if keep_mtp else without_mtp(config)
    source = of_model(source, config)
    with output(out) as partial:
        partial.mkdir()
        ids = write_tokenizer(partial, tokenizer, config) if tokenizer else {}
        write_json(partial / "config.json", {**huggingface_config(config, dtype), **ids})
        write_generation_config(partial, ids)
        for name in HUGGINGFACE_FILES:
            shutil.copyfile(Path(megamoe.__file__).parent / name, partial / Path(name).name)
        save_shards(source, partial, dtype, shard_bytes)


def without_mtp(config: ModelConfig) -> ModelConfig:
    """The model without multi-token prediction."""
    return config.model_copy(update={"num_nextn_predict_layers": 0})


def of_model(source: Source, config: ModelConfig) -> Source:
    """A source less what a model of `config` has no use for: multi-token prediction, a head that is the embedding."""
    kept = copy.copy(source)
    names = parameter_shapes(config)
    kept.shapes = {name: shape for name, shape in source.shapes.items() if name in names}
    if not config.num_nextn_predict_layers:
        kept.buffers = {name: tensor for name, tensor in source.buffers.items() if not name.startswith(MTP)}
    return kept


def huggingface_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
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
        "dtype": str(dtype).removeprefix("torch."),
        "rope_parameters": rope,
        **fields,
    }
