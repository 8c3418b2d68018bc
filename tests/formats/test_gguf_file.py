"""GGUF files, as the real llama.cpp reads them."""

import pytest
import torch
from exported import Weights, random_decoder, random_source
from gguf import GGUFReader
from llama_cpp import LlamaCpp
from model_parts import LLAMA_3

from megamoe.config.model import ModelConfig
from megamoe.data.tokenizer import train_tokenizer
from megamoe.formats.gguf_file import gguf_entries, write_gguf
from megamoe.model.generation import generate

SHAPE = dict(
    vocab_size=300, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=24, max_position_embeddings=64, rope_theta=5000.0,
    rms_norm_eps=3e-5, gated_mlp=True, num_local_experts=8, num_experts_per_tok=3,
)  # fmt: skip
UNTIED = {"tie_word_embeddings": False}
GROUPS = {"n_group": 4, "topk_group": 2}
BIASES = {"attention_bias": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA = {"router_bias": False}
OLMOE = {"router_bias": False, "norm_topk_prob": False, "qk_norm": "full", "head_dim": 16, "num_key_value_heads": 4}
QWEN_3 = {"router_bias": False, "qk_norm": "head"}
MINIMAX = {"router_score": "sigmoid", "qk_norm": "full", "partial_rotary_factor": 0.5}
GLM_4 = {
    "router_score": "sigmoid",
    "qk_norm": "head",
    "partial_rotary_factor": 0.5,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
DEEPSEEK = {
    "router_score": "sigmoid",
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 24,
    "num_key_value_heads": 4,
}
# As published models have it, and with what else the architecture takes.
PUBLISHED = {
    "llama": LLAMA | UNTIED,
    "olmoe": OLMOE | UNTIED,
    "qwen3moe": QWEN_3 | UNTIED,
    "minimax-m2": MINIMAX | UNTIED,
    "glm4moe": GLM_4 | UNTIED | BIASES | GROUPS,
    "deepseek2": DEEPSEEK | UNTIED | GROUPS | {"rope_interleaved": True},
}
OTHERWISE = {
    "llama": LLAMA | BIASES | {"attention_out_bias": True, "rope_interleaved": True, "rope_scaling": LLAMA_3},
    "olmoe": OLMOE | BIASES | {"rope_interleaved": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "qwen3moe": QWEN_3 | BIASES | GROUPS | {"rope_interleaved": True, "rope_scaling": YARN},
    "minimax-m2": MINIMAX
    | BIASES
    | {"rope_interleaved": True, "router_score": "softmax", "rope_scaling": YARN | {"attention_factor": 1.3}},
    "glm4moe": GLM_4 | {"qk_norm": None, "norm_topk_prob": False, "rope_interleaved": True, "mlp_only_layers": [1]},
    "deepseek2": DEEPSEEK
    | {"q_lora_rank": None, "router_score": "softmax", "norm_topk_prob": False, "first_k_dense_replace": 0}
    | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}, "num_nextn_predict_layers": 1},
}
IDS = torch.randint(1, 300, (24,), generator=torch.Generator().manual_seed(1)).tolist()
LENGTHS = (1, 2, 7, 24)
END_OF_TEXT = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["to be or not to be, that is the question"] * 9, 280).save(str(path))
    return path


def preset(changes):
    return ModelConfig(**{**SHAPE, **changes})


@torch.no_grad()
def log_probs(model, ids):
    return model(torch.tensor([ids])).log_softmax(-1)[0]


def largest_difference(llama, model):
    ours = log_probs(model, IDS)
    return max((llama.log_probs(IDS[:length], 300) - ours[length - 1]).abs().max().item() for length in LENGTHS)


@pytest.mark.parametrize(("name", "changes"), [*PUBLISHED.items(), *OTHERWISE.items()])
def test_llama_cpp_computes_the_decoders_probabilities_and_its_greedy_text(name, changes, tokenizer, tmp_path):
    model = random_decoder(preset(changes))
    assert write_gguf(Weights(model), tmp_path / "m.gguf", torch.float32, model.config, tokenizer) == name
    llama = LlamaCpp(tmp_path / "m.gguf")
    assert largest_difference(llama, model) < 1e-4
    (text,) = generate(model, [IDS], 12, temperature=0, end_of_text=END_OF_TEXT)
    assert [token for token in llama.greedy(IDS, 12) if token != END_OF_TEXT] == text


@pytest.mark.parametrize(("dtype", "kind", "most"), [(torch.float16, "F16", 0.02), (torch.bfloat16, "BF16", 0.06)])
def test_matrices_have_the_dtype_and_vectors_router_and_bias_are_fp32(dtype, kind, most, tokenizer, tmp_path):
    model = random_decoder(preset(PUBLISHED["glm4moe"]), std=0.1)
    source = Weights(model)
    write_gguf(source, tmp_path / "m.gguf", dtype, model.config, tokenizer)
    found = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert found == {
        entry.name: kind if entry.dtype == dtype else "F32" for entry in gguf_entries(source, dtype, model.config)
    }
    assert found["blk.1.ffn_gate_inp.weight"] == found["blk.1.exp_probs_b.bias"] == found["blk.1.attn_q.bias"] == "F32"
    assert found["blk.1.ffn_up_exps.weight"] == found["token_embd.weight"] == kind
    assert 1e-4 < largest_difference(LlamaCpp(tmp_path / "m.gguf"), model) < most


def test_one_parameter_is_in_memory_at_a_time(tokenizer, tmp_path):
    config = preset(PUBLISHED["qwen3moe"])
    source = random_source(config)
    read, largest = source.read, max(tensor.numel() for tensor in source.tensors.values())
    written = []

    def counted(name, kind, start, count):
        size = next(tmp_path.glob(".m.gguf.partial/m.gguf")).stat().st_size
        written.append((size, count))
        return read(name, kind, start, count)

    source.read = counted
    write_gguf(source, tmp_path / "m.gguf", torch.float32, config, tokenizer)
    sizes = [size for size, _ in written]
    assert max(count for _, count in written) == largest
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 3  # what is read is on its way to the disk before the last is
