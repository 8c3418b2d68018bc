"""What leaves megamoe gives the logits that the training model gave, and finds the way back."""

import json
import math
import resource

import pytest
import torch
from devices import assert_near
from engines import CONFIG, GATED, make, save, train
from exported import load, random_source
from ranks import run_ranks
from refusals import has, refusal
from safetensors.torch import load_file

from megamoe.checkpoint.opening import open_model, open_source, run_record
from megamoe.config.model import ModelConfig
from megamoe.formats.config_json import differences, preset_of
from megamoe.formats.export import (
    Entry,
    entries,
    shards,
    write_huggingface,
    write_safetensors,
    write_state_dict,
)
from megamoe.model.names import is_buffer

pytestmark = pytest.mark.usefixtures("module_cache")
IDS = torch.randint(CONFIG.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
FP32 = torch.float32


def train_save_and_ask(folder, ep_size, config):
    """Logits of the training model itself, after the steps that are saved."""
    engine = make(ep_size, config=config)
    train(engine, 6)
    save(engine, folder, 6)
    engine.module.eval()
    with torch.no_grad():
        return engine.module(IDS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(checkpoint, logits of the training model)."""
    folder = tmp_path_factory.mktemp("trained")
    logits, other_rank = run_ranks(2, train_save_and_ask, folder, 2, GATED)
    assert torch.equal(logits, other_rank)
    return folder / "step_6", logits


def config_of(checkpoint):
    return ModelConfig(**run_record(checkpoint)["model"])


def huggingface(checkpoint, out, dtype=FP32, tokenizer=None, config=None, shard_bytes=10**9):
    source = open_source(checkpoint)
    write_huggingface(source, out, dtype, shard_bytes, config or config_of(checkpoint), tokenizer)
    return out


@torch.no_grad()
def test_in_bf16_the_weights_are_rounded_masters_and_the_bias_stays_fp32(trained, tmp_path):
    checkpoint, logits = trained
    folder = huggingface(checkpoint, tmp_path / "hf", torch.bfloat16)
    masters = open_source(checkpoint)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if is_buffer(name):
            assert torch.equal(tensor, masters.buffers[name])
        else:
            shape = masters.shapes[name]
            master = masters.read(name, "fp32", 0, math.prod(shape)).view(shape)
            assert torch.equal(tensor, master.bfloat16())
    found = [entry.name for entry in entries(masters, torch.bfloat16)]
    assert (found[0], found[-1]) == ("model.embed_tokens.weight", "model.norm.weight")  # in the order of the layers
    assert_near(load(folder, dtype="auto")(IDS).logits, logits.double(), torch.bfloat16)


def test_a_model_saved_again_by_transformers_comes_back(trained, tmp_path):
    checkpoint, logits = trained
    load(huggingface(checkpoint, tmp_path / "hf")).save_pretrained(tmp_path / "again")
    config = config_of(checkpoint)
    assert differences(config, preset_of(tmp_path / "again")) == []
    decoder = open_model(tmp_path / "again").load(FP32, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(decoder(IDS), logits, atol=1e-6, rtol=0)


def test_an_output_that_exists_is_left_alone_and_a_failed_one_leaves_nothing(trained, tmp_path):
    checkpoint, _ = trained
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    has(refusal(huggingface, checkpoint, tmp_path / "mine"), "mine exists already", "choose another output")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # as on a disk that is full
    try:
        has(refusal(huggingface, checkpoint, tmp_path / "hf"), "hf cannot be written", "space")
        has(
            refusal(write_state_dict, open_source(checkpoint), tmp_path / "w.pt", FP32),
            "w.pt cannot be written",
            "space",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_shards_hold_every_tensor_once_and_none_is_larger_than_asked_unless_one_tensor_is():
    sizes = [5, 3, 3, 9, 40, 1, 1, 1, 8]
    all_entries = [Entry(str(number), (size,), torch.float32) for number, size in enumerate(sizes)]
    groups = shards(all_entries, most_bytes=40)
    assert [entry for group in groups for entry in group] == all_entries
    assert [[entry.nbytes // 4 for entry in group] for group in groups] == [[5, 3], [3], [9], [40], [1, 1, 1], [8]]


def test_values_beyond_fp16_are_refused_and_nothing_is_left(tmp_path):
    source = random_source(CONFIG)
    name = "model.layers.1.self_attn.o_proj.weight"
    source.tensors[name][0, 0] = 1e5
    for convert_to, out in ((write_state_dict, "w.pt"), (write_safetensors, "w.safetensors")):
        more = () if convert_to is write_state_dict else (10**9,)
        has(refusal(convert_to, source, tmp_path / out, torch.float16, *more), name, "float16", "--dtype bf16")
        convert_to(source, tmp_path / f"fine_{out}", torch.bfloat16, *more)
    assert {path.name for path in tmp_path.iterdir()} == {"fine_w.pt", "fine_w.safetensors"}


def test_a_shard_is_on_the_disk_before_the_next_is_read(tmp_path):
    source = random_source(CONFIG)
    read, written = source.read, []

    def counted(*args):
        written.append(len(list(tmp_path.glob(".out.partial/out/*.safetensors"))))
        return read(*args)

    source.read = counted
    write_safetensors(source, tmp_path / "out", FP32, 30_000)
    assert written == sorted(written)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert set(written) == set(range(len(files)))
    assert all(file.stat().st_size < 35_000 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in source.tensors.values())
