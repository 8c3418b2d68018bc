"""Sparse models of dense ones, as transformers computes both."""

import json

import native_models
import pytest
import torch
import transformers
from model_parts import LLAMA_3
from refusals import has, refusal, refusals
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from megamoe.formats.upcycle import Upcycling, read_dense, upcycle

SHAPE = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rope_theta=5000.0, rms_norm_eps=3e-5,
)  # fmt: skip
SCALED = {"rope_parameters": {**LLAMA_3, "rope_theta": 7000.0}, "tie_word_embeddings": True}
DENSE = {
    "Llama": (transformers.LlamaConfig, {}),
    "Llama, scaled and tied": (transformers.LlamaConfig, SCALED),
    "Qwen3": (transformers.Qwen3Config, {"head_dim": 12}),
    "Qwen3, biased and tied": (
        transformers.Qwen3Config,
        {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    ),
}
IDS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def write_dense(folder, name, dtype=torch.float32):
    """A dense model in several shards, with a tokenizer's files."""
    kind, changes = DENSE[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**SHAPE, **changes})).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    Tokenizer(models.WordLevel({"to": 0, "be": 1}, unk_token="to")).save(str(folder / "tokenizer.json"))
    return model


@pytest.fixture
def dense(tmp_path):
    write_dense(tmp_path / "dense", "Llama")
    return tmp_path / "dense"


@torch.no_grad()
def loss(model):
    return model(IDS, labels=IDS).loss.item()


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(("name", "split"), zip(DENSE, (1, 3, 2, 3), strict=True))
def test_the_sparse_model_computes_what_the_dense_one_does_in_transformers_and_in_megamoe(name, split, tmp_path):
    model = write_dense(tmp_path / "dense", name)
    made = upcycle(tmp_path / "dense", tmp_path / "sparse", Upcycling(experts=4, top_k=2, split=split), 20_000)
    sparse = load(tmp_path / "sparse")
    assert type(sparse).__name__ == made == {"L": "MixtralForCausalLM", "Q": "Qwen3MoeForCausalLM"}[name[0]]
    assert (sparse.config.num_local_experts, sparse.config.num_experts_per_tok) == (4 * split, 2 * split)
    assert loss(sparse) == pytest.approx(loss(model), abs=2e-6)
    ours = native_models.decoder_of(tmp_path / "sparse")
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(sparse(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(IDS), expected, atol=1e-5, rtol=1e-5)


def gates(folder):
    tensors = {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}
    return {name: one for name, one in tensors.items() if name.endswith("gate.weight")}, tensors


def test_the_router_is_drawn_from_the_seed_and_equal_for_the_parts_of_a_copy(dense, tmp_path):
    for name, changes in {"a": {}, "b": {"seed": 1}, "c": {"split": 2}}.items():
        upcycle(dense, tmp_path / name, Upcycling(experts=16, top_k=2, **changes), 10**9)
    (first, _), (other, _), (split, _) = (gates(tmp_path / name) for name in "abc")
    assert len(first) == 2
    for name, weight in first.items():
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not torch.equal(weight, other[name])
        assert torch.equal(split[name], weight.repeat_interleave(2, 0))
    assert len({weight[0, 0].item() for weight in first.values()}) == 2


def test_noise_is_of_the_size_asked_for_and_differs_between_experts(dense, tmp_path):
    upcycle(dense, tmp_path / "plain", Upcycling(experts=3, top_k=2), 10**9)
    upcycle(dense, tmp_path / "noisy", Upcycling(experts=3, top_k=2, noise=0.25), 10**9)
    (_, plain), (_, noisy) = gates(tmp_path / "plain"), gates(tmp_path / "noisy")
    experts = [name for name in plain if ".experts." in name]
    assert len(experts) == 2 * 3 * 3
    drawn = {name: (noisy[name] - plain[name]) / plain[name].std() for name in experts}
    assert all(noise.std().item() == pytest.approx(0.25, rel=0.1) for noise in drawn.values())
    assert len({round(noise.flatten()[0].item(), 4) for noise in drawn.values()}) == len(experts)
    assert all(torch.equal(plain[name], noisy[name]) for name in plain.keys() - experts)


def test_the_files_have_the_dense_models_dtype_and_size_and_its_tokenizer(tmp_path):
    write_dense(tmp_path / "dense", "Qwen3", torch.bfloat16)
    native_models.edit_config(tmp_path / "dense", bos_token_id=1)
    upcycle(tmp_path / "dense", tmp_path / "sparse", Upcycling(experts=4, top_k=2), 20_000)
    files = sorted((tmp_path / "sparse").glob("model-*.safetensors"))
    assert len(files) > 3
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"BF16"}  # noqa: SIM118
            assert sum(opened.get_tensor(name).nbytes for name in opened.keys()) <= 20_000  # noqa: SIM118
    config, tokenizer = ((tmp_path / "sparse" / name).read_text() for name in ("config.json", "tokenizer.json"))
    assert tokenizer == (tmp_path / "dense" / "tokenizer.json").read_text()
    values = json.loads(config)
    assert (values["dtype"], values["bos_token_id"]) == ("bfloat16", 1)


def test_a_missing_key_has_the_dense_classs_value(tmp_path):
    for name in ("Llama", "Qwen3"):
        theirs = DENSE[name][0]()
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [f"{name}ForCausalLM"]}))
        _, values = read_dense(tmp_path / "config.json")
        of_heads = theirs.hidden_size // theirs.num_attention_heads
        found = (values["rms_norm_eps"], values["rope_theta"], values.get("head_dim", of_heads))
        assert found == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"], theirs.head_dim)


def refused(dense):
    return refusal(upcycle, dense, dense.parent / "sparse", Upcycling(experts=4, top_k=2), 10**9)


REFUSED = [
    ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM, Qwen3ForCausalLM"]),
    ({"attention_bias": True}, ["attention_bias is true", "MixtralForCausalLM has no place"]),
    ({"mlp_bias": True}, ["mlp_bias is true"]),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ['"longrope"', "linear, dynamic, yarn"]),
    ({"hidden_size": None}, ["hidden_size", "null"]),
    ({"parallel_attention": True}, ['"parallel_attention"', "remove"]),
    ({"vocab_size": 97}, ["model.embed_tokens.weight", "(96, 32)", "(97, 32)"]),
]


def test_a_dense_model_that_has_no_sparse_form_is_refused(dense, tmp_path):
    whole = (dense / "config.json").read_text()
    for changes, words in REFUSED:
        (dense / "config.json").write_text(whole)
        native_models.edit_config(dense, **changes)
        has(refused(dense), *words)
    sorted(dense.glob("*.safetensors"))[1].write_bytes(b"damaged")
    (dense / "config.json").write_text(whole)
    has(refused(dense), "cannot be read")
    write_dense(tmp_path / "qwen", "Qwen3")
    native_models.edit_config(tmp_path / "qwen", use_sliding_window=True)
    has(refused(tmp_path / "qwen"), "use_sliding_window is true")
    assert not list(tmp_path.glob("sparse*"))


def test_all_wrong_numbers_are_named_at_once(dense, tmp_path):
    said = refusals(upcycle, dense, tmp_path / "sparse", Upcycling(experts=2, top_k=3, split=5), 10**9)
    for problem, part in zip(said, ("--top_k is 3, above --experts 2", "--split is 5"), strict=True):
        has(problem, part)


def test_the_tool_says_what_it_made_and_overwrites_nothing(dense, tmp_path, call):
    words = ("upcycle", dense, tmp_path / "sparse", "--experts", 4, "--top_k", 2, "--split", 2)
    first, second = call(*words)
    assert first == "MixtralForCausalLM with 8 experts per layer, 4 per token"
    has(second, f"wrote {tmp_path / 'sparse'} from {dense} in ")
    has(refusal(call, *words), "sparse exists already")
