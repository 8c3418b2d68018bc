"""A model made by transformers goes through megamoe and comes back: the same logits, hidden states and experts."""

import native_models
import pytest
import torch
import torch.distributed as dist
from engines import BATCH, make, save, train
from ranks import run_ranks

from megamoe.checkpoint.restore import restore_first_verified
from megamoe.formats.architectures import ARCHITECTURES
from megamoe.formats.config_json import preset_of
from megamoe.model.generation import generate

STEPS = 10


def first_batch():
    """The batch of step 0 of `engines.train`."""
    return torch.randint(4, (BATCH, 17), generator=torch.Generator().manual_seed(0)).cumsum(1) % native_models.VOCAB


def train_each(folder, names):
    """Import on two ranks with ep_size 2, train and save; then resume with ep_size 1 and save again. Returns the losses
    by class."""
    losses = {}
    for name in names:
        config = preset_of(folder / name)
        engine = make(2, config=config)
        restore_first_verified(engine, [folder / name], weights_only=True)
        losses[name] = train(engine, STEPS)
        save(engine, folder / f"{name}_run", STEPS)
        resharded = make(1, seed=99, config=config)  # other weights, so that a restore shows
        restore_first_verified(resharded, [folder / f"{name}_run" / f"step_{STEPS}"])
        save(resharded, folder / f"{name}_resharded", STEPS)
        dist.barrier()
    return losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder with a directory by transformers and a checkpoint for each class, losses by class)."""
    folder = tmp_path_factory.mktemp("round_trip")
    for name in native_models.CLASSES:
        native_models.new_model(name).save_pretrained(folder / name)
    return folder, run_ranks(2, train_each, folder, list(native_models.CLASSES))[0]


@pytest.mark.parametrize("name", native_models.CLASSES)
def test_import_train_reshard_export_gives_transformers_the_same_model(trained, tmp_path, name, call):
    folder, losses = trained
    batch = first_batch()
    with torch.no_grad():
        logits = native_models.load(folder / name)(batch[:, :-1]).logits
    begins_at = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()
    assert losses[name][0] == pytest.approx(begins_at, rel=1e-4)
    assert losses[name][-1] < losses[name][0] - 0.5  # it has learnt

    said = call("convert", folder / f"{name}_resharded", tmp_path / "out")
    assert f"of transformers: {name}ForCausalLM" in said[0]

    ours, theirs = native_models.decoder_of(tmp_path / "out"), native_models.load(tmp_path / "out")
    assert preset_of(tmp_path / "out") == preset_of(folder / name)
    ids, real = native_models.batch()
    run = native_models.run_theirs(theirs, ids, real)
    assert native_models.distance(native_models.run_ours(ours, ids, real), run) < 1e-4
    assert (
        native_models.distance(native_models.run_theirs(native_models.load(folder / name), ids, real), run) > 0.01
    )  # it is not where it began
    if ARCHITECTURES[f"{name}ForCausalLM"].has_bias:
        moved = [bias for key, bias in theirs.state_dict().items() if key.endswith("e_score_correction_bias")]
        assert moved
        assert all(bias.abs().max() > 1e-3 for bias in moved)

    prompts = [row[mask].tolist() for row, mask in zip(ids, real, strict=True)]
    out = theirs.generate(ids, attention_mask=real.long(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert out[:, ids.shape[1] :].tolist() == generate(ours, prompts, 8, temperature=0)  # both with a cache
