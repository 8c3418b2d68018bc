"""The code-carrying export does what transformers' own models do: compared with the decoder it comes from, or with
transformers' Mixtral of the same size."""

import copy

import pytest
import torch
from engines import plain_state
from exported import cache_of, close, export, load, random_decoder
from toy import PRESET
from transformers import (
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from megamoe.config.model import ModelConfig
from megamoe.data.tokenizer import train_tokenizer
from megamoe.model.names import is_buffer

pytestmark = pytest.mark.usefixtures("module_cache")
VOCAB = 270
CONFIG = ModelConfig(**{**PRESET, "vocab_size": VOCAB, "initializer_range": 0.2})
IDS = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
LEFT = torch.arange(12) >= torch.tensor([[5], [0], [2]])  # real tokens of left-padded rows


@pytest.fixture(scope="module")
def decoder():
    return random_decoder(CONFIG)


@pytest.fixture(scope="module")
def folder(decoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    train_tokenizer(["to be or not to be"], VOCAB).save(str(out / "tokenizer.json"))
    return export(decoder, out / "hf", out / "tokenizer.json")


@pytest.fixture
def model(folder):
    return load(folder)


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_autocast_gives_the_same_logits_to_bf16_and_routes_in_fp32(model):
    exact = model(IDS, output_router_logits=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(IDS, labels=IDS, output_router_logits=True)
    rounded.loss.backward()
    assert rounded.logits.dtype == cache_of(rounded).layers[0].keys.dtype == torch.bfloat16
    assert {logits.dtype for logits in rounded.router_logits} == {torch.float32}
    spread = exact.logits.std()
    assert (rounded.logits - exact.logits).square().mean().sqrt() < 0.1 * spread
    assert {weight.grad.dtype for weight in model.parameters() if weight.grad is not None} == {torch.float32}


def test_the_trainer_trains_in_bf16(model, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(20, 1)]
    options = {"max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "save_strategy": "no"}
    arguments = TrainingArguments(tmp_path, bf16=True, gradient_checkpointing=True, use_cpu=True, **options)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 8
    assert trainer.evaluate()["eval_loss"] < losses[-1] < 0.9 * before


def test_gradient_checkpointing_recomputes_the_blocks_and_gives_the_same_gradients(model):
    model.train()  # expert_dropout and router_jitter_noise are 0
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    expected = gradients(model, input_ids=IDS, attention_mask=LEFT, labels=IDS)
    assert len(calls) == 1
    for use_reentrant, calls_until_now in ((False, 3), (True, 5)):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        found = gradients(model, input_ids=IDS, attention_mask=LEFT, labels=IDS)
        assert len(calls) == calls_until_now
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            close(found[name], gradient, atol=1e-6)


@torch.no_grad()
def test_attention_is_what_its_name_says_and_eager_gives_weights_over_latents_and_tokens(folder):
    latents = CONFIG.num_latent_tokens
    for name in ("sdpa", "eager"):
        model = load(folder, attn_implementation=name)
        assert model.config._attn_implementation == name
        called = []
        for layer in model.model.layers:
            layer.self_attn.attend.weights.register_forward_hook(lambda *_, called=called: called.append(1))
        model(IDS)
        assert len(called) == (len(model.model.layers) if name == "eager" else 0)
    attentions = model(IDS, attention_mask=LEFT, output_attentions=True).attentions
    assert len(attentions) == CONFIG.num_hidden_layers
    for weights in attentions:
        assert weights.shape == (3, CONFIG.num_attention_heads, 12, latents + 12)
        close(weights.sum(-1), torch.ones(3, CONFIG.num_attention_heads, 12))
        assert weights[..., :latents].min() > 0  # every token sees all latents
        assert weights[..., latents:].triu(1).max() == 0
        assert weights[0, :, 5:, latents : latents + 5].max() == 0  # padding


@torch.no_grad()
def test_hidden_states_and_router_logits_are_those_of_the_decoder_and_add_nothing_to_the_loss(model, decoder):
    expected, chosen = [decoder.embed_tokens(IDS)], []
    hooks = [layer.register_forward_hook(lambda _, __, out: expected.append(out[0])) for layer in decoder.layers]
    hooks += [router.register_forward_hook(lambda _, __, out: chosen.append(out[1])) for router in decoder.routers()]
    decoder(IDS)
    for hook in hooks:
        hook.remove()
    expected[-1] = decoder.norm(expected[-1])  # as in transformers: the last is behind the norm
    outputs = model(IDS, labels=IDS, output_hidden_states=True, output_router_logits=True)
    assert len(outputs.hidden_states) == CONFIG.num_hidden_layers + 1
    for one, other in zip(outputs.hidden_states, expected, strict=True):
        close(one, other)
    for logits, router, expert_ids in zip(outputs.router_logits, decoder.routers(), chosen, strict=True):
        assert logits.shape == (IDS.numel(), CONFIG.num_local_experts)
        found = (logits.softmax(-1) + router.selection_bias).topk(CONFIG.num_experts_per_tok).indices
        assert torch.equal(found, expert_ids)
    assert outputs.loss == model(IDS, labels=IDS).loss
    assert outputs.aux_loss is None


@torch.no_grad()
def test_sequences_packed_into_one_row_do_not_see_each_other(model, decoder):
    positions = torch.cat((torch.arange(5), torch.arange(7))).unsqueeze(0)
    packed = model(IDS[:1], position_ids=positions, use_cache=False).logits
    close(packed[:, :5], decoder(IDS[:1, :5]))
    close(packed[:, 5:], decoder(IDS[:1, 5:]))


def test_embeddings_stand_in_for_ids_and_both_are_refused(model):
    embeddings = model.get_input_embeddings()(IDS)
    close(model(inputs_embeds=embeddings).logits, model(IDS).logits, atol=0)
    for inputs in ({}, {"input_ids": IDS, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            model(**inputs)


def test_loss_and_gradients_are_the_decoders_with_padding_left_out(model, decoder):
    labels = IDS.masked_fill(~(LEFT & LEFT.roll(1, 1)), -100)  # nor is a row's first token predicted from padding
    ours = copy.deepcopy(decoder)
    expected = ours(IDS[:, :-1], labels[:, 1:], attention_mask=LEFT[:, :-1])
    close(model(IDS, attention_mask=LEFT, labels=labels).loss, expected)
    expected.backward()
    found = gradients(model, input_ids=IDS, attention_mask=LEFT, labels=labels)
    for weight in ours.parameters():
        weight.data = torch.zeros_like(weight) if weight.grad is None else weight.grad
    for name, gradient in plain_state(ours).items():
        if not is_buffer(name):
            close(found.get(name, torch.zeros_like(gradient)), gradient)


def test_a_pipeline_generates_the_models_text_and_the_tokenizer_comes_without_a_question(folder, model, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks whether to run code"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True, batch_size=2)
    prompts = ["to be", "or not to be"]
    found = generate(prompts, max_new_tokens=6, do_sample=False, return_full_text=False)
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert text[0]["generated_text"] == tokenizer.decode(out[0, ids.shape[1] :])


def test_loaded_in_bf16_the_router_stays_fp32(folder, decoder):
    model = load(folder, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for layer, router in zip(model.model.layers, decoder.routers(), strict=True):
        assert torch.equal(layer.moe.router.selection_bias, router.selection_bias)
        assert torch.equal(layer.moe.router.weight, router.weight)


def test_a_new_model_has_the_initial_weights_of_a_configuration(model):
    fresh = type(model)(copy.deepcopy(model.config))
    router = fresh.model.layers[0].moe.router
    assert router.selection_bias.abs().max() == 0
    assert router.running_load.sum().item() == pytest.approx(1)
    for name, weight in fresh.named_parameters():
        assert weight.std() == 0 if "norm" in name else 0.1 < weight.std() < 0.3, name
