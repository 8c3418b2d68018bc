"""A Mixture-of-Experts model from a dense one: the MLP of each layer is copied into experts, the rest stays.

Source: Komatsuzaki et al., "Sparse Upcycling" (arXiv:2212.05055). With `split`, each copy is several narrower experts
with equal rows in the router, so that a token is sent to whole copies until training tells the parts apart: the virtual
groups of He et al., "Upcycling Large Language Models into Mixture of Experts" (arXiv:2410.07524). The weights of the
chosen experts sum to 1, so the parts' down projections are multiplied by `split`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from megamoe.config.cli import Options
from megamoe.config.model import ModelConfig
from megamoe.formats.architectures import MIXTRAL, QWEN3_MOE, ROUTER, Architecture
from megamoe.formats.config_json import class_of, read_config
from megamoe.formats.export import write_huggingface
from megamoe.formats.native_files import NativeFiles
from megamoe.formats.source import WeightsAlone, read_whole
from megamoe.model.costs import parameter_shapes
from megamoe.model.decoder import seeded_generator
from megamoe.model.names import ExpertName, layer_id, split_expert
from megamoe.utils.errors import Problems, shown

ROUTER_STD = 0.02
PROJECTIONS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")  # their places number the draws of noise


@dataclass(frozen=True)
class Pair:
    """A dense class of transformers, and the sparse one that it becomes. Keys are those of config.json."""

    sparse: Architecture
    only: dict[str, tuple[Any, ...]]
    """Keys of the dense class that must have one of these values, or be missing."""
    dropped: tuple[str, ...]
    """Keys of the dense class that the sparse one does not have, or reads otherwise, and that say nothing here."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """The dense class's values of missing keys, where the sparse one has others."""
    stated: dict[str, Any] = field(default_factory=dict)
    """Keys that make the sparse class compute what the dense one does."""


DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "num_key_value_heads": None}  # of both dense classes
PAIRS = {
    "LlamaForCausalLM": Pair(
        MIXTRAL,
        only={"attention_bias": (False,), "mlp_bias": (False,), "sliding_window": (None,)},
        dropped=("attention_bias", "mlp_bias", "pretraining_tp"),
    ),
    "Qwen3ForCausalLM": Pair(
        QWEN3_MOE,
        only={"use_sliding_window": (False,)},
        dropped=("sliding_window", "max_window_layers", "layer_types"),
        defaults={"head_dim": 128},
        stated={"norm_topk_prob": True, "mlp_only_layers": []},
    ),
}


class Upcycling(Options):
    """What is made of each MLP."""

    experts: int = Field(default=8, ge=1, description="copies of each MLP")
    top_k: int = Field(default=2, ge=1, description="copies that a token is sent to")
    split: int = Field(default=1, ge=1, description="narrower experts that each copy is split into")
    noise: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="noise on the copies, in a matrix's standard deviations"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the router and the noise")


def upcycle(directory: Path, out: Path, recipe: Upcycling, shard_bytes: int) -> str:
    """Write the sparse model of the dense one in `directory`, and return its class. Raises UserError."""
    path = directory / "config.json"
    pair, values = read_dense(path)
    sparse = pair.sparse
    keys = {key.field: name for name, key in sparse.keys.items()}
    experts: dict[str, Any] = {keys["num_local_experts"]: 1, keys["num_experts_per_tok"]: 1}
    experts[keys["moe_intermediate_size"]] = values.get("intermediate_size")
    dense = read_config(sparse, values | experts, str(path))
    problems = Problems()
    if recipe.top_k > recipe.experts:
        problems.append(f"--top_k is {recipe.top_k}, above --experts {recipe.experts}; lower it.")
    if dense.intermediate_size % recipe.split:
        limit = f"which does not divide intermediate_size {dense.intermediate_size}"
        problems.append(f"--split is {recipe.split}, {limit}; use a divisor.")
    problems.refuse()
    config = dense.model_copy(
        update={
            "num_local_experts": recipe.experts * recipe.split,
            "num_experts_per_tok": recipe.top_k * recipe.split,
            "moe_intermediate_size": dense.intermediate_size // recipe.split,
        }
    )
    all_dense = dense.model_copy(update={"mlp_only_layers": list(range(dense.num_hidden_layers))})
    source = Upcycled(NativeFiles(directory, sparse, all_dense), config, recipe)
    tokenizer = directory / "tokenizer.json"
    write_huggingface(source, out, source.dtype, shard_bytes, config, tokenizer, architecture=sparse)
    return sparse.name


def read_dense(path: Path) -> tuple[Pair, dict[str, Any]]:
    """The pair of a dense model's config.json, and its values as those of the sparse class, but for the experts. Raises
    UserError."""
    name, values = class_of(path, PAIRS)
    pair = PAIRS[name]
    Problems(
        f"{path}: {key} is {shown(values[key])}, which {pair.sparse.name} has no place for; give a model with "
        f"{' or '.join(map(shown, allowed))}."
        for key, allowed in pair.only.items()
        if values.get(key, allowed[0]) not in allowed
    ).refuse()
    values = {key: value for key, value in values.items() if key not in pair.dropped}
    return pair, {**DEFAULTS, **pair.defaults, **values, **pair.stated}


class Upcycled(WeightsAlone):
    """The sparse model as a source of plain tensors; each is made when it is read."""

    def __init__(self, files: NativeFiles, config: ModelConfig, recipe: Upcycling):
        self.dtype, self.buffers = files.dtype, dict[str, Tensor]()
        self.shapes = parameter_shapes(config)
        self._files, self._recipe = files, recipe

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        expert = split_expert(name)
        if expert:
            return self._expert(name, expert).flatten()[start : start + count]
        if name.endswith(ROUTER):
            return self._router(name).flatten()[start : start + count]
        return self._files.read(name, kind, start, count)

    def _expert(self, name: str, expert: ExpertName) -> Tensor:
        """A part of the dense projection, often a view of the mapped file."""
        recipe, (rows, columns) = self._recipe, self.shapes[name]
        dense = f"{expert.layer.removesuffix('moe.experts')}mlp.{expert.parameter}"
        values = read_whole(self._files, dense)
        part = expert.expert % recipe.split
        if "down_proj" in name:
            weight = values[:, part * columns : (part + 1) * columns] * recipe.split
        else:
            weight = values[part * rows : (part + 1) * rows]
        if recipe.noise:
            projection = PROJECTIONS.index(expert.parameter)
            generator = seeded_generator(recipe.seed, layer_id(name) or 0, expert.expert, projection)
            noise = torch.randn(weight.shape, generator=generator)
            weight = weight + recipe.noise * weight.std() * noise  # not in place: it may be a view of the mapped file
        return weight

    def _router(self, name: str) -> Tensor:
        """Rows are equal for the parts of a copy."""
        recipe, generator = self._recipe, seeded_generator(self._recipe.seed, layer_id(name) or 0)
        rows = torch.randn(recipe.experts, self.shapes[name][1], generator=generator)
        return (ROUTER_STD * rows).repeat_interleave(recipe.split, 0)
