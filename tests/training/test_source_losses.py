"""The loss of each source of a mix, against each sample by itself in float64."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from corpora import build
from ranks import run_ranks
from toy import check, ds_of_samples, train_here, write_inputs, write_phases

from megamoe.data.document_bounds import Documents
from megamoe.model.decoder import Decoder

MTP = {"document_attention": True, "num_nextn_predict_layers": 1, "initializer_range": 0.3}


def mixed_run(folder, **options):
    """A run on three parts of `books` and one of `code`, whose documents are short, packed without cuts."""
    run = write_inputs(folder, ds_of_samples(16, 2), MTP)
    draw = np.random.default_rng(5)
    for name, item, words in (("books", 7, 96), ("code", 11, 24)):
        (folder / name).mkdir()
        build(folder / name / "train", draw.integers(0, words, 900), np.int16, item=item)
    data = [f"{folder / 'books'}=3", str(folder / "code")]
    return {**run, "data": data, "packing": "best_fit", "run_dir": str(folder / "run"), "ep_size": 2, **options}


def nats_by_source(run, step):
    """Of the first weights, each sample of a step by itself in float64: {source: (sum of nats, tokens)}."""
    checked = check(run, 2)
    model, found = Decoder(checked.model, seed=checked.run.seed).double().eval(), defaultdict[str, list](list)
    sources = list(checked.data.sources.values())
    for number, index in checked.data.step_samples(step):
        sample = sources[number].sample(index)
        ids, labels = torch.zeros(1, 16, dtype=torch.int64), torch.full((1, 16), -100)
        ids[0, : len(sample.ids)] = torch.from_numpy(sample.ids)
        labels[0, : len(sample.labels)] = torch.from_numpy(sample.labels)
        nats = model.score(ids, labels, Documents.of([sample.starts], [len(sample.ids)], 16)).nats
        found[["books", "code"][number]].append((nats.sum().item(), (labels != -100).sum().item()))
    return {name: tuple(map(sum, zip(*rows, strict=True))) for name, rows in found.items()}


def test_the_loss_of_a_source_is_the_mean_over_its_own_tokens_on_all_ranks(tmp_path):
    run = mixed_run(tmp_path, steps=1, recompute_blocks=1)
    (first,), *_ = (log["train"] for log in run_ranks(2, train_here, run))
    expected = nats_by_source({**run, "run_dir": str(tmp_path / "reference")}, 1)
    means = {f"loss/{name}": nats / tokens for name, (nats, tokens) in expected.items()}
    assert {name: value for name, value in first.items() if name.startswith("loss/")} == pytest.approx(means, rel=2e-6)
    assert abs(means["loss/books"] - means["loss/code"]) > 1e-2
    nats, tokens = (sum(one) for one in zip(*expected.values(), strict=True))
    assert first["loss"] == pytest.approx(nats / tokens, rel=2e-6)


def test_a_source_that_no_step_of_the_window_has_read_has_no_loss(tmp_path):
    run = mixed_run(tmp_path, steps=3)
    run["data_schedule"] = write_phases(tmp_path, (16, 2), (16, None), data=[str(tmp_path / "code")])
    logs = run_ranks(2, train_here, run)[0]["train"]
    names = [{name for name in record if name.startswith("loss/")} for record in logs]
    assert names == [{"loss/books", "loss/code"}, {"loss/books", "loss/code"}, {"loss/code"}]
    assert logs[2]["loss/code"] == pytest.approx(logs[2]["loss"], rel=1e-6)
    plain = {**write_inputs(tmp_path, ds_of_samples(16, 2)), "run_dir": str(tmp_path / "plain"), "steps": 1}
    (record,) = run_ranks(2, train_here, plain)[0]["train"]
    assert not [name for name in record if name.startswith("loss/")]
