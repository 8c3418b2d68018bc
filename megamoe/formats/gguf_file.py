"""Write a model as a GGUF file, which llama.cpp and what is built on it run.

Tensors have llama.cpp's names and layouts: the experts of a layer in one tensor, queries and keys in the order in which
the architecture's RoPE takes them, latent attention's kv_b split and its key part transposed, as absorbed by the query,
and what its norms take scaled for the epsilon that llama.cpp gives them.
Matrices have the dtype that is asked for; vectors, the router and the balancing bias are fp32.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    ExpertGatingFuncType,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
)
from torch import Tensor

from megamoe.config.model import ModelConfig
from megamoe.formats.architectures import BIAS
from megamoe.formats.export import Entry, rounded
from megamoe.formats.gguf_models import (
    GgufArchitecture,
    architecture_of,
    frequency_factors,
    yarn_attention,
)
from megamoe.formats.gguf_tokenizer import add_tokenizer
from megamoe.formats.source import Source, read_whole
from megamoe.model.costs import parameter_shapes
from megamoe.model.latent_attention import COMPRESSED_NORM_EPS
from megamoe.model.names import EMBEDDING, HEAD, MTP, split_expert
from megamoe.utils.disk import output

TYPES = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32, np.float32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, np.float16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, np.int16),
}
# Plain names as the gguf package knows them from published models.
RENAMED = {
    f".{BIAS}": ".mlp.gate.e_score_correction.bias",
    ".moe.router.weight": ".mlp.gate.weight",
    ".moe.experts.": ".mlp.experts.",
    ".shared_mlp.": ".mlp.shared_experts.",
}
FP32 = (".mlp.gate.weight",)


class LazyTensor:
    """What GGUFWriter takes for an array, read piece by piece while it is written."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: Callable[[], Iterator[Tensor]]):
        """
        Args:
            pieces: fp32, one after the other in the file.
        """
        self.name, self.shape, self.torch_dtype, self._pieces = name, shape, dtype, pieces
        self.dtype = np.dtype(TYPES[dtype][2])
        self.nbytes = math.prod(shape) * dtype.itemsize

    def tofile(self, file: IO[bytes]) -> None:
        """Raises UserError where a value is beyond the dtype."""
        for piece in self._pieces():
            values = rounded(piece, self.torch_dtype, self.name)
            bits = values.view(torch.int16) if self.torch_dtype == torch.bfloat16 else values
            file.write(bits.contiguous().numpy().data)


def fitting(source: Source, config: ModelConfig) -> GgufArchitecture:
    """The architecture of llama.cpp that holds the model. Raises UserError if none does."""
    biased = any(bool(bias.any()) for name, bias in source.buffers.items() if name.endswith(BIAS))
    return architecture_of(config, biased)


def gguf_entries(source: Source, dtype: torch.dtype, config: ModelConfig) -> list[Entry]:
    """All tensors that `write_gguf` writes. Raises UserError if llama.cpp has no architecture for the model."""
    planned = tensors(source, config, fitting(source, config), dtype)
    return [Entry(tensor.name, tensor.shape, tensor.torch_dtype) for tensor in planned]


def write_gguf(source: Source, out: Path, dtype: torch.dtype, config: ModelConfig, tokenizer: Path) -> str:
    """Write `out` and return the name of its architecture. Raises UserError if llama.cpp has none for the model, or
    would tokenise otherwise."""
    architecture = fitting(source, config)
    with output(out) as file, contextlib.closing(GGUFWriter(file, architecture.name)) as writer:
        writer.add_name(out.stem)
        writer.add_file_type(TYPES[dtype][1])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        add_shape(writer, config, architecture)
        add_router(writer, config)
        add_rope(writer, config)
        add_tokenizer(writer, tokenizer, config)
        for tensor in tensors(source, config, architecture, dtype):
            writer.add_tensor(tensor.name, tensor, raw_dtype=TYPES[tensor.torch_dtype][0])  # type: ignore[arg-type]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return architecture.name


# --- metadata -------------------------------------------------------------------------------------------------------


def add_shape(writer: GGUFWriter, config: ModelConfig, architecture: GgufArchitecture) -> None:
    """Sizes, and those of attention."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size if architecture.dense_blocks else config.expert_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(config.num_attention_heads)
    if config.kv_lora_rank:  # queries absorb kv_b, so that all heads share the compressed key and value
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + config.rotary_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(config.head_dim)
        writer.add_value_length_mla(config.value_dim)
        writer.add_kv_lora_rank(config.kv_lora_rank)
        writer.add_q_lora_rank(config.q_lora_rank or 0)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def add_router(writer: GGUFWriter, config: ModelConfig) -> None:
    """Experts, how they are chosen and weighted, and which blocks have none."""
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.expert_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_leading_dense_block_count(config.leading_dense_blocks)
    writer.add_expert_gating_func(ExpertGatingFuncType[config.router_score.upper()])
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.topk_group < config.n_group:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def add_rope(writer: GGUFWriter, config: ModelConfig) -> None:
    """Rotated dimensions, base and scaling; that of "llama3" is in a tensor."""
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(RopeScalingType(scaling["rope_type"]))
    writer.add_rope_scaling_factor(scaling["factor"])
    if scaling["rope_type"] == "yarn":
        original = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(int(original))
        if config.kv_lora_rank:
            writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])  # llama.cpp takes the 0.1 out again
        else:
            writer.add_rope_scaling_attn_factors(yarn_attention(config))


# --- tensors --------------------------------------------------------------------------------------------------------


def tensors(
    source: Source, config: ModelConfig, architecture: GgufArchitecture, dtype: torch.dtype
) -> Iterator[LazyTensor]:
    """All tensors of the file, layer by layer. The block of multi-token prediction is left out."""
    names = get_tensor_name_map(
        next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture.name), config.num_hidden_layers
    )

    def lazy(name: str, shape: tuple[int, ...], pieces: Callable[[], Iterator[Tensor]]) -> LazyTensor:
        for plain, published in RENAMED.items():
            name = name.replace(plain, published)
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert renamed, f"{architecture.name} has no {name}"
        kept = len(shape) < 2 or name.endswith(FP32)
        return LazyTensor(renamed, shape, torch.float32 if kept else dtype, pieces)

    for name, parts in stacks(config).items():
        shape = source.shapes[parts[0]]
        shape = (len(parts), *shape) if split_expert(parts[0]) else shape

        def read(parts: list[str] = parts) -> Iterator[Tensor]:
            for part in parts:
                tensor = in_rotary_order(part, read_whole(source, part), config, architecture.interleaved)
                yield under_one_epsilon(part, tensor, config)

        if name.endswith("kv_b_proj.weight"):
            yield from (lazy(*split) for split in split_kv(name, read, config))
        else:
            yield lazy(name, shape, read)
    if config.tie_word_embeddings and architecture.needs_head:
        yield lazy(HEAD, source.shapes[EMBEDDING], lambda: iter([read_whole(source, EMBEDDING)]))
    if architecture.selection_bias:
        for name, bias in biases(source, config, architecture).items():
            yield lazy(name, tuple(bias.shape), partial(iter, [bias]))
    if config.rope_scaling and config.rope_scaling["rope_type"] == "llama3":
        factors = frequency_factors(config)
        yield LazyTensor("rope_freqs.weight", tuple(factors.shape), torch.float32, partial(iter, [factors]))


def stacks(config: ModelConfig) -> dict[str, list[str]]:
    """The plain parameters that make each tensor of the file: themselves, or those of a layer's experts under a name
    without their ids."""
    found = defaultdict(list)
    for name in parameter_shapes(config):
        expert = split_expert(name)
        if not name.startswith(MTP):
            found[f"{expert.layer}.{expert.parameter}" if expert else name].append(name)
    return found


def biases(source: Source, config: ModelConfig, architecture: GgufArchitecture) -> dict[str, Tensor]:
    """The balancing bias of each layer; zeros where the model has none and llama.cpp wants one."""
    names = [f"model.layers.{block}.{BIAS}" for block in range(config.num_hidden_layers)]
    sparse = [name for block, name in enumerate(names) if not config.is_dense(block)]
    zeros = torch.zeros(config.num_local_experts) if architecture.needs_bias else None
    found = {name: source.buffers.get(name, zeros) for name in sparse}
    return {name: bias for name, bias in found.items() if bias is not None}


def split_kv(name: str, read: Callable[[], Iterator[Tensor]], config: ModelConfig) -> list[tuple[Any, ...]]:
    """Latent attention's kv_b (heads * (nope + value), rank) as k_b (heads, rank, nope) and v_b (heads, value, rank):
    name, shape and pieces of each."""
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    assert rank
    nope, value = config.head_dim - config.rotary_dim, config.value_dim

    def keys() -> Iterator[Tensor]:
        for kv in read():
            yield kv.view(heads, nope + value, rank)[:, :nope].transpose(1, 2)

    def values() -> Iterator[Tensor]:
        for kv in read():
            yield kv.view(heads, nope + value, rank)[:, nope:]

    return [
        (name.replace("kv_b_proj", "k_b_proj"), (heads, rank, nope), keys),
        (name.replace("kv_b_proj", "v_b_proj"), (heads, value, rank), values),
    ]


def in_rotary_order(name: str, tensor: Tensor, config: ModelConfig, interleaved: bool) -> Tensor:
    """A plain parameter, with the rows that make queries and keys in the order in which RoPE takes them as pairs."""
    if config.rope_interleaved == interleaved:
        return tensor
    module = name.split(".")[-2]
    rotated = config.rotary_dim
    if config.kv_lora_rank:  # the rotated part is the last one: of each head's query, of the shared key
        first = {"q_proj": 0, "q_b_proj": 0, "kv_a_proj_with_mqa": config.kv_lora_rank}.get(module)
        head, start = (rotated, 0) if module == "kv_a_proj_with_mqa" else (config.head_dim, config.head_dim - rotated)
    else:
        first = 0 if module in ("q_proj", "k_proj", "q_norm", "k_norm") else None
        head, start = config.head_dim, 0
    if first is None:
        return tensor
    pairs = torch.arange(rotated).view((-1, 2) if config.rope_interleaved else (2, -1)).T.flatten()
    order = torch.arange(head)
    order[start : start + rotated] = start + pairs
    heads = tensor[first:].unflatten(0, (-1, head))[:, order].flatten(0, 1)
    return torch.cat([tensor[:first], heads])


def under_one_epsilon(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """A plain parameter, so that the norms of latent attention's compressed vectors give with rms_norm_eps, which
    llama.cpp has in all norms, what they give with an epsilon of their own: x / sqrt(m + e) = kx / sqrt(k^2 m + k^2 e).
    """
    if not config.kv_lora_rank or not name.endswith(("q_a_proj.weight", "kv_a_proj_with_mqa.weight")):
        return tensor
    compressed = config.q_lora_rank if name.endswith("q_a_proj.weight") else config.kv_lora_rank
    factors = torch.ones(len(tensor), 1)
    factors[:compressed] = math.sqrt(config.rms_norm_eps / COMPRESSED_NORM_EPS)
    return tensor * factors
