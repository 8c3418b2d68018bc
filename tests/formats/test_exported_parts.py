"""The code-carrying export has every part that a configuration can ask for."""

import json
import re

import pytest
import torch
from exported import cache_of, close, export, load, random_decoder
from model_parts import LLAMA_3, PARTS, SHAPE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megamoe.config.model import ModelConfig
from megamoe.formats.config_json import TRAINING_ONLY
from megamoe.formats.export import own_code
from megamoe.model.names import MTP

pytestmark = pytest.mark.usefixtures("module_cache")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGURATIONS = {
    "latent tokens, full norm, gated shared experts": {
        **PARTS["latent_tokens"],
        **PARTS["full_norm_out_bias"],
        **PARTS["gated_shared_experts"],
        **PARTS["plain_scores"],
        "rope_scaling": YARN,
        "rope_theta": 500.0,
        "hidden_act": "gelu",
        "expert_dropout": 0.1,
        "router_jitter_noise": 0.1,
        "rms_norm_eps": 1e-2,
    },
    "head norm, partial rotary, windows in some layers, dense layers, untied": {
        **PARTS["head_norm_partial_rope"],
        **PARTS["sliding_multi_token"],
        **PARTS["dense_layers"],
        **PARTS["gated_narrow_experts"],
        "rope_interleaved": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    },
    "windows in all layers": {"sliding_window": 7, "n_shared_experts": 2, "rope_scaling": LLAMA_3},
    "latent attention, sigmoid, groups": {
        **PARTS["latent_attention"],
        **PARTS["sigmoid_groups"],
        "q_lora_rank": 14,
        "attention_bias": True,
        "rope_scaling": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5},
        "gated_mlp": True,
    },
}
IDS = torch.randint(SHAPE["vocab_size"], (3, 24), generator=torch.Generator().manual_seed(0))
LEFT = torch.arange(24) >= torch.tensor([[9], [0], [2]])  # real tokens of left-padded rows


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def exported(request, tmp_path_factory):
    """(folder, decoder)."""
    decoder = random_decoder(ModelConfig(**{**SHAPE, **CONFIGURATIONS[request.param]}))
    return export(decoder, tmp_path_factory.mktemp("export") / "hf"), decoder


def test_the_configurations_together_change_every_field():
    changed = set().union(*CONFIGURATIONS.values())
    assert ModelConfig.model_fields.keys() - changed - SHAPE.keys() == TRAINING_ONLY


@torch.no_grad()
def test_logits_and_text_are_the_decoders_with_padding_and_with_every_cache(exported):
    folder, decoder = exported
    expected, whole = decoder(IDS, attention_mask=LEFT), decoder(IDS)
    assert expected.std() > 0.3
    for attn_implementation in ("eager", "sdpa"):
        model = load(folder, attn_implementation=attn_implementation)
        close(model(IDS, attention_mask=LEFT).logits[LEFT], expected[LEFT])
        close(model(IDS).logits, whole)
        cache = cache_of(model(IDS[:, :20], attention_mask=LEFT[:, :20], use_cache=True))
        for end in range(21, 25):
            outputs = model(IDS[:, end - 1 : end], attention_mask=LEFT[:, :end], past_key_values=cache)
            close(outputs.logits[:, 0], expected[:, end - 1])
    options = {"attention_mask": LEFT.long(), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    text = model.generate(IDS, use_cache=False, **options)
    for cache in ("static", "dynamic"):
        assert torch.equal(model.generate(IDS, cache_implementation=cache, **options), text), cache


def test_training_under_autocast_gives_every_weight_a_gradient(exported):
    model = load(exported[0]).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS, labels=IDS).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@torch.no_grad()
def test_multi_token_prediction_is_left_out_unless_asked_for(tmp_path):
    decoder = random_decoder(ModelConfig(**SHAPE, num_nextn_predict_layers=1))
    expected = decoder(IDS)
    for keep_mtp in (False, True):
        folder = export(decoder, tmp_path / f"hf_{keep_mtp}", keep_mtp=keep_mtp)
        names = load_file(folder / "model.safetensors").keys()
        assert any(name.startswith(MTP) for name in names) == keep_mtp
        assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == int(keep_mtp)
        model, found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        close(model.eval()(IDS).logits, expected)
        assert not found["unexpected_keys"]  # nor a warning of them


def test_the_model_imports_every_file_that_goes_with_it():
    # Before 5.12 transformers copies only those into its cache of modules.
    files = own_code()
    imported = re.findall(r"^from \.(\w+) import", files[0].read_text(), re.MULTILINE)
    assert {*imported, "modeling_megamoe"} == {file.stem for file in files}
