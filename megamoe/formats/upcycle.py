"""A Mixture-of-Experts model from a dense one: the MLP of each layer is copied into experts, the rest stays.

Source: Komatsuzaki et al., "Sparse Upcycling" (arXiv:2212.05055). With `split`, each copy is several narrower experts
with equal rows in the router, so that a token is sent to whole copies until training tells the parts apart: the virtual
groups of He et al., "Upcycling Large Language Models into Mixture of Experts" (arXiv:2410.07524). The weights of the
chosen experts sum to 1, so the parts' down projections are multiplied by `split`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamoe.formats.architectures import ROUTER
from megamoe.formats.config_json import read_config
from megamoe.formats.export import output, save_shards
from megamoe.formats.plain_files import Stored, open_safetensors, weight_files
from megamoe.formats.source import WeightsAlone
from megamoe.formats.tokenizer_files import copy_tokenizer
from megamoe.formats.upcycle_config import PROJECTIONS, Pair, read_dense, sparse_config
from megamoe.model.names import EMBEDDING, HEAD
from megamoe.utils.errors import UserError
from megamoe.utils.json_files import write_json

ROUTER_STD = 0.02
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DENSE_MLP = re.compile(rf"model\.layers\.(\d+)\.mlp\.({'|'.join(PROJECTIONS)})\.weight")


@dataclass(frozen=True)
class Recipe:
    """What is made of each MLP."""

    copies: int
    top_k: int
    """Copies that a token is sent to."""
    split: int = 1
    """Experts that each copy is split into."""
    noise: float = 0.0
    """Normal noise on an expert's matrices, in their standard deviations."""
    seed: int = 0

    def problems(self, intermediate_size: int) -> list[str]:
        """What does not fit, one sentence each."""
        problems = [
            f"--{name} is {value}; give 1 or more."
            for name, value in (("experts", self.copies), ("top_k", self.top_k), ("split", self.split))
            if value < 1
        ]
        if self.top_k > self.copies:
            problems.append(f"--top_k is {self.top_k}, above --experts {self.copies}; lower it.")
        if self.split > 0 and intermediate_size % self.split:
            problems.append(
                f"--split is {self.split}, which does not divide intermediate_size {intermediate_size}; use a divisor."
            )
        if not 0 <= self.noise < float("inf"):
            problems.append(f"--noise is {self.noise}; give a finite number, 0 or more.")
        if not 0 <= self.seed < 2**63:
            problems.append(f"--seed is {self.seed}; give a number from 0 to 2^63 - 1.")
        return problems


def upcycle(directory: Path, out: Path, recipe: Recipe, shard_bytes: int) -> str:
    """Write the sparse model of the dense one in `directory`, and return its class. Raises UserError."""
    pair, dense = read_dense(directory / "config.json")
    problems = recipe.problems(dense["intermediate_size"])
    if problems:
        raise UserError(*problems)
    size = dense["intermediate_size"] // recipe.split
    values = sparse_config(pair, dense, recipe.copies * recipe.split, recipe.top_k * recipe.split, size)
    read_config(pair.sparse, values, str(directory / "config.json"))  # refuses what megamoe would not read again
    source = Upcycled(DenseFiles(directory, pair, dense), pair, dense, recipe)
    with output(out) as folder:
        folder.mkdir()
        write_json(folder / "config.json", {**values, "dtype": str(source.dtype).removeprefix("torch.")})
        copy_tokenizer(directory, folder)
        save_shards(source, folder, source.dtype, shard_bytes)
    return pair.sparse.name


def dense_shapes(pair: Pair, dense: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the dense model."""
    hidden, size, head_dim = dense["hidden_size"], dense["intermediate_size"], dense["head_dim"]
    query, key = (dense[heads] * head_dim for heads in ("num_attention_heads", "num_key_value_heads"))
    rows = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, query)}
    layer: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": shape for name, shape in rows.items()}
    if pair.may_have_bias and dense.get("attention_bias"):
        layer |= {f"self_attn.{name}.bias": shape[:1] for name, shape in rows.items()}
    if pair.qk_norm:
        layer |= {f"self_attn.{name}.weight": (head_dim,) for name in ("q_norm", "k_norm")}
    layer |= {f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    layer |= dict(
        zip((f"mlp.{name}.weight" for name in PROJECTIONS), [(size, hidden)] * 2 + [(hidden, size)], strict=True)
    )
    embedding = (dense["vocab_size"], hidden)
    shapes = {EMBEDDING: embedding, "model.norm.weight": (hidden,)}
    if not dense.get("tie_word_embeddings", False):
        shapes[HEAD] = embedding
    layers = range(dense["num_hidden_layers"])
    return shapes | {f"model.layers.{number}.{name}": shape for number in layers for name, shape in layer.items()}


class DenseFiles:
    """The safetensors of a dense model, read in ranges."""

    def __init__(self, directory: Path, pair: Pair, dense: dict[str, Any]):
        """Raises UserError if a file is missing or damaged, or the tensors are not those of the configuration."""
        self.shapes = dense_shapes(pair, dense)
        self._stored: dict[str, Stored] = {}
        files = weight_files(directory, ".safetensors")
        if not files:
            raise UserError(f"{directory} has no .safetensors files; give a directory that has.")
        for file in files:
            self._stored |= open_safetensors(file)
        if HEAD not in self.shapes:
            self._stored.pop(HEAD, None)  # the embedding once more
        self._stored = {name: one for name, one in self._stored.items() if not name.endswith("rotary_emb.inv_freq")}
        self._check(directory)
        dtypes = {DTYPES[one.dtype] for one in self._stored.values()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

    def _check(self, directory: Path) -> None:
        for name, one in self._stored.items():
            scale = name not in self.shapes and "scale" in name.rpartition(".")[2]
            if scale or one.dtype not in DTYPES:
                raise UserError(
                    f"{directory}: {name} is of {one.dtype}, a quantised weight or what belongs to one; give the "
                    "unquantised model."
                )
        for name in sorted(self.shapes.keys() ^ self._stored.keys()):
            what = "lacks" if name in self.shapes else "has, beyond its config.json,"
            raise UserError(f"{directory} {what} {name}; make or fetch it again.")
        for name, shape in self.shapes.items():
            found = self._stored[name].shape
            if found != shape:
                raise UserError(f"{directory}: {name} has the shape {found}, where its config.json says {shape}.")

    def read(self, name: str, *ranges: slice) -> Tensor:
        """A tensor, or a range of its rows and of its columns, in fp32; often a view of the mapped file."""
        return self._stored[name].get()[ranges].float()


class Upcycled(WeightsAlone):
    """The sparse model as a source of tensors under its published names; each is made when it is read."""

    def __init__(self, files: DenseFiles, pair: Pair, dense: dict[str, Any], recipe: Recipe):
        self.dtype, self.buffers = files.dtype, dict[str, Tensor]()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files, self._recipe = files, recipe
        self._make: dict[str, Callable[[], Tensor]] = {}
        names = pair.sparse.tensors
        experts = recipe.copies * recipe.split
        for name, shape in files.shapes.items():
            mlp = DENSE_MLP.fullmatch(name)
            if not mlp:
                self.shapes[name], self._make[name] = shape, partial(files.read, name)
                continue
            layer = f"model.layers.{mlp[1]}."
            rows, columns = shape
            narrow = (rows, columns // recipe.split) if mlp[2] == "down_proj" else (rows // recipe.split, columns)
            for expert in range(experts):
                made = layer + names[f"moe.experts.{{}}.{mlp[2]}.weight"][0].format(expert)
                self.shapes[made], self._make[made] = narrow, partial(self._expert, name, expert)
            gate = layer + names[ROUTER][0]
            self.shapes[gate] = (experts, dense["hidden_size"])
            self._make[gate] = partial(self._router, int(mlp[1]), dense["hidden_size"])

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        return self._make[name]().flatten()[start : start + count]

    def _expert(self, name: str, expert: int) -> Tensor:
        recipe = self._recipe
        down = "down_proj" in name
        size = self._files.shapes[name][1 if down else 0] // recipe.split
        part = slice(expert % recipe.split * size, (expert % recipe.split + 1) * size)
        weight = self._files.read(name, slice(None), part) * recipe.split if down else self._files.read(name, part)
        if recipe.noise:
            mlp = DENSE_MLP.fullmatch(name)
            assert mlp
            generator = _generator(recipe.seed, int(mlp[1]), expert, PROJECTIONS.index(mlp[2]))
            noise = torch.randn(weight.shape, generator=generator)
            weight = weight + recipe.noise * weight.std() * noise  # not in place: it may be a view of the mapped file
        return weight

    def _router(self, layer: int, hidden_size: int) -> Tensor:
        """Rows are equal for the parts of a copy."""
        rows = torch.randn(self._recipe.copies, hidden_size, generator=_generator(self._recipe.seed, layer))
        return (ROUTER_STD * rows).repeat_interleave(self._recipe.split, 0)


def _generator(seed: int, *key: int) -> torch.Generator:
    """A generator for each (seed, *key)."""
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
