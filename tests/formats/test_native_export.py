"""Models written as classes of transformers: which, what is in the files, and what transformers makes of them."""

import native_models
import pytest
import torch
from exported import Weights
from refusals import has
from safetensors.torch import load_file

from megamoe.checkpoint.opening import open_model
from megamoe.config.model import ModelConfig
from megamoe.formats.architectures import ARCHITECTURES, AUX_LOSS
from megamoe.formats.config_json import preset_of
from megamoe.formats.export import native_class, write_huggingface
from megamoe.model.decoder import Decoder

BIAS = "router.selection_bias"


@pytest.fixture
def model_of(tmp_path):
    """A class's tiny model of megamoe's, with changes to its configuration; its weights as a source."""

    def model_of(name, bias=0.0, **changes):
        folder = tmp_path / f"{name}_from"
        native_models.new_model(name).save_pretrained(folder)
        config = ModelConfig(**(preset_of(folder).model_dump() | changes))
        model = Decoder(config, seed=1).eval()
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith(BIAS):
                buffer.normal_(0, bias, generator=torch.Generator().manual_seed(0)) if bias else buffer.zero_()
        return model, Weights(model), config

    return model_of


def write(source, config, out, dtype=torch.float32, **options):
    architecture, sentence = native_class(source, config)
    assert architecture, sentence
    write_huggingface(source, out, dtype, 10**9, config, None, architecture=architecture, **options)
    return out


def test_fields_without_a_place_are_named(model_of):
    for name, changes, field in (
        ("Mixtral", {"hidden_act": "relu", "n_shared_experts": 1}, "n_shared_experts 1"),
        ("Mixtral", {"layer_types": ["full_attention"] + 2 * ["sliding_attention"]}, "layer_types"),
        ("Qwen3Moe", {"attention_out_bias": False}, "attention_out_bias false"),
        ("Olmoe", {"head_dim": 12}, "head_dim 12"),
        ("Glm4Moe", {"first_k_dense_replace": 0, "mlp_only_layers": [2]}, "mlp_only_layers [2]"),
        ("Glm4Moe", {"n_shared_experts": 0}, "n_shared_experts 0"),
        ("DeepseekV3", {"shared_expert_gate": True}, "shared_expert_gate true"),
        ("MiniMaxM2", {"routed_scaling_factor": 2.0}, "routed_scaling_factor 2"),
    ):
        _, source, config = model_of(name, **changes)
        architecture, sentence = native_class(source, config)
        assert architecture is None
        has(sentence, f"{name}ForCausalLM is the nearest", field)


def test_a_bias_that_is_zero_fits_the_softmax_classes_and_another_does_not(model_of, tmp_path):
    for bias in (0.0, 0.01):
        _, source, config = model_of("Mixtral", bias, router_bias=True)
        architecture, sentence = native_class(source, config)
        assert (architecture is None) == (bias > 0)
    has(sentence, "MixtralForCausalLM", "balancing bias", "router_bias", "0.0")


def test_dense_layers_are_said_as_each_class_says_them(model_of, tmp_path):
    model, source, config = model_of("Qwen3Moe", first_k_dense_replace=1, mlp_only_layers=[])
    out = write(source, config, tmp_path / "out")
    again = preset_of(out)
    assert (again.first_k_dense_replace, again.mlp_only_layers) == (0, [0])
    batch = native_models.batch()
    theirs = native_models.run_theirs(native_models.load(out), *batch)
    assert native_models.distance(theirs, native_models.run_ours(model, *batch)) < 1e-4


def test_biases_are_fp32_in_a_bf16_file_and_a_model_without_them_has_zeros(model_of, tmp_path):
    for name, bias in (("MiniMaxM2", True), ("Glm4Moe", True), ("DeepseekV3", True), ("DeepseekV3", False)):
        model, source, config = model_of(name, 0.1 * bias, router_bias=bias)
        out = write(source, config, tmp_path / f"{name}_{bias}", torch.bfloat16)
        held = load_file(out / "model.safetensors")
        biases = {key: tensor for key, tensor in held.items() if key.endswith("e_score_correction_bias")}
        assert {tensor.dtype for tensor in biases.values()} == {torch.float32}
        assert all(tensor.dtype == torch.bfloat16 for key, tensor in held.items() if key not in biases)
        assert len(biases) == len(model.routers())
        expected = [router.selection_bias for router in model.routers()] if bias else len(biases) * [torch.zeros(8)]
        assert all(torch.equal(one, two) for one, two in zip(biases.values(), expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["Glm4Moe", "DeepseekV3"])
def test_multi_token_prediction_is_left_out_unless_it_is_kept(model_of, tmp_path, name, monkeypatch):
    import transformers
    from transformers.modeling_layers import MtpModel

    model, source, config = model_of(name, 0.1, num_nextn_predict_layers=1)
    without = write(source, config, tmp_path / "without")
    assert not any("layers.3." in key for key in load_file(without / "model.safetensors"))
    assert native_models.load(without).config.num_nextn_predict_layers == 0

    out = write(source, config, tmp_path / "with", keep_mtp=True)
    again = open_model(out).load(torch.float32, torch.device("cpu"))
    assert all(torch.equal(one, two) for one, two in zip(again.parameters(), model.parameters(), strict=True))

    # transformers takes them at the depths of published models only.
    of_class = getattr(transformers, f"{name}PreTrainedModel")
    monkeypatch.setattr(of_class, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3.*"])
    theirs = native_models.load(out)
    assert len(MtpModel.from_pretrained(theirs).layers) == theirs.config.num_nextn_predict_layers == 1


def test_a_class_without_a_place_for_multi_token_prediction_leaves_it_out_and_cannot_keep_it(model_of, tmp_path):
    for name in native_models.CLASSES.keys() - {"Glm4Moe", "DeepseekV3"}:
        _, source, config = model_of(name, num_nextn_predict_layers=1)
        held = load_file(write(source, config, tmp_path / name) / "model.safetensors")
        assert not any("layers.3." in key or "mtp" in key for key in held)
        architecture, sentence = native_class(source, config, keep_mtp=True)
        assert architecture is None
        has(sentence, f"{name}ForCausalLM", "num_nextn_predict_layers", "--keep_mtp")


def test_every_architecture_has_a_tiny_model_in_which_no_key_has_the_value_that_it_has_where_it_is_missing():
    assert {f"{name}ForCausalLM" for name in native_models.CLASSES} == ARCHITECTURES.keys()
    for name, own in native_models.CLASSES.items():
        values = native_models.COMMON | own
        exempt = {"tie_word_embeddings", AUX_LOSS}  # true in three classes; training alone
        exempt |= {"num_key_value_heads", "head_dim"} if name in ("Olmoe", "DeepseekV3") else set()
        for key, one in ARCHITECTURES[f"{name}ForCausalLM"].keys.items():
            if key not in exempt:
                assert values.get(key, values.get(one.alias, one.default)) != one.default, (name, key)
