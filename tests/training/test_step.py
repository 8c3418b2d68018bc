"""The protocol of a step: what it tells, how often the host reads the device, how often ranks meet."""

import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from devices import on_gpus
from operators import Operators
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from toy import PRESET, ds_config, recipe_of, shipped, train_here, write_inputs

import megamoe
from megamoe.config.model import ModelConfig, load_preset
from megamoe.data.batches import Batch
from megamoe.data.document_bounds import Documents
from megamoe.model.decoder import Decoder
from megamoe.training.loop import Trainer
from megamoe.training.step import build_train_step

FOLDER = str(Path(megamoe.__file__).parent)
# Operations whose result, or its shape, the host has to know: on a GPU it waits for them.
READS = ["_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2", "bincount"]
METHODS = ("tolist", "numpy", "cpu")  # of torch.Tensor; those of a CPU tensor call no operation


def caller():
    """The innermost function of megamoe that has led here, as "package/module.py:function"."""
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(FOLDER):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).relative_to(FOLDER)}:{frame.f_code.co_name}" if frame else "?"


class Watcher(TorchDispatchMode):
    """Counts reads of tensors by the host and all-reduces, by who asks for them."""

    def __init__(self):
        super().__init__()
        self.reads, self.all_reduces = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name in READS:
            self.reads[caller()] += 1
        if name == "allreduce_":
            self.all_reduces[caller()] += 1
        return func(*args, **(kwargs or {}))

    def counted(self, method):
        def call(tensor, *args, **kwargs):
            self.reads[caller()] += 1
            return method(tensor, *args, **kwargs)

        return call


def watched(run):
    watcher, plain = Watcher(), Trainer.run
    methods = {name: watcher.counted(getattr(torch.Tensor, name)) for name in METHODS}

    def run_watched(*args, **kwargs):
        with watcher, patch.multiple(torch.Tensor, **methods):
            return plain(*args, **kwargs)

    with patch.object(Trainer, "run", run_watched):
        train_here(run)
    return watcher.reads, watcher.all_reduces


BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}
LOSSES = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "router_aux_loss_coef": 0.05,
    "router_z_loss_coef": 0.01,
    "output_z_loss_coef": 0.01,
}


@pytest.mark.parametrize(
    ("stage", "dtype", "preset"), [(2, {}, {}), (1, BF16, LOSSES)], ids=["fp32", "bf16, all losses"]
)
def test_the_host_reads_once_per_step_and_ranks_meet_once_besides_gradients(tmp_path, stage, dtype, preset):
    ds = ds_config(2, accumulation=2, gradient_clipping=0.01, **dtype)
    ds["zero_optimization"].update(stage=stage, reduce_bucket_size=5000)
    run = {**write_inputs(tmp_path, ds, preset), "run_dir": str(tmp_path / "run"), "ep_size": 2, "steps": 5}
    results = run_ranks(2, watched, {**run, "log_interval": 2, "save_interval": 2, "guard": "act", "ema_decay": 0.9})
    for reads, all_reduces in results:
        # Elsewhere: the layer, which on CPU lays out its rows on the host; a save; what looks at numbers of the host.
        others = ("model/all_to_all.py", "model/dispatch.py", "checkpoint/", "training/metrics.py", "monitoring/")
        assert {who: count for who, count in reads.items() if not who.startswith(others)} == {
            "training/step_sums.py:read": 5,
            "launch/distributed.py:on_any_rank": 1,  # before the first step
            "evaluation/scoring.py:score": 2,  # after the last, of both weights
            "evaluation/held_out.py:run": 2,
        }
        if stage == 2:
            assert all_reduces.pop("training/zero_step.py:allreduce_and_scatter") >= 5 * 2  # of gradients
        assert all_reduces == {
            "training/step_sums.py:sum_over_ranks": 5,
            "launch/distributed.py:on_any_rank": 1,
            "evaluation/scoring.py:score": 2,
        }


# --- the parts of the loss ---


def parts_of_steps(kinds, micro_batch, accumulation):
    """By kind of balance loss, of three steps of eight samples: losses, parts, and the loss in evaluation before."""
    return {kind: parts_of_three_steps(kind, micro_batch, accumulation) for kind in kinds}


def parts_of_three_steps(kind, micro_batch, accumulation):
    # With weights large enough that experts differ in their shares.
    config = ModelConfig(**{**PRESET, **LOSSES}, router_aux_loss_type=kind, router_load_decay=0, initializer_range=0.3)
    ds = ds_config(micro_batch, accumulation)
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    train_step = build_train_step(config, recipe_of(ds), ep_size=min(world_size, 2))
    results, evaluated = [], 0.0
    for step in range(3):
        ids = torch.randint(4, (8, 18), generator=torch.Generator().manual_seed(step)).cumsum(-1) % 96
        if step == 0:
            train_step.model.eval()
            with torch.no_grad():
                evaluated = train_step.model(ids[:, :16], ids[:, 1:17]).item()
            train_step.model.train()
        own = ids.view(accumulation, world_size, micro_batch, 18)[:, rank]
        train_step.forward_backward([Batch(one[:, :16], one[:, 1:]) for one in own])
        results.append(train_step.update())
    return [result.loss for result in results], [result.parts for result in results], evaluated


def test_the_loss_is_the_cross_entropy_and_its_other_parts_are_the_same_for_any_split_but_the_micro_batchs():
    kinds = ["sequence", "global_batch", "micro_batch"]
    (whole,) = run_ranks(1, parts_of_steps, kinds, 4, 2)
    splits = [
        found for ranks, *split in ((1, 2, 4), (4, 1, 2)) for found in run_ranks(ranks, parts_of_steps, kinds, *split)
    ]
    for kind, (losses, parts, evaluated) in whole.items():
        assert losses[0] == pytest.approx(evaluated, abs=1e-5)
        assert all(value > 0.5 for of_step in parts for value in of_step.values())
        for other_losses, other_parts, _ in (split[kind] for split in splits):
            # The losses that follow from another balance loss are others too.
            compared = slice(1) if kind == "micro_batch" else slice(None)
            assert other_losses[compared] == pytest.approx(losses[compared], abs=1e-5)
            for found, expected in zip(other_parts[compared], parts[compared], strict=True):
                assert list(found) == ["mtp", "balance", "router_z", "output_z"]
                depends = {"balance"} if kind == "micro_batch" else set()
                assert {name for name in found if abs(found[name] - expected[name]) > 2e-5} == depends


def losses_of_short_rows(lengths):
    """Of a step whose rows have so many tokens on each rank: its losses, and for each part the sum of the losses of
    this rank's rows, each given alone, and how many they are."""
    config = ModelConfig(**{**PRESET, **LOSSES}, router_aux_loss_type="sequence")
    train_step, rank = build_train_step(config, recipe_of(ds_config(1, 2))), torch.distributed.get_rank()
    ids = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(rank))
    model, alone, batches = train_step.model, torch.zeros(5, 2), []
    for row, length in zip(ids.split(1), lengths[rank], strict=True):
        labels = torch.full((1, 17), -100)
        labels[:, : length - 1] = row[:, 1:length]
        model(row[:, :length], labels[:, : length + 1])
        alone += model.step_losses * length
        model.step_losses.zero_()
        batches.append(Batch(row, labels, Documents.of([np.arange(0)], [length], 16)))
    train_step.forward_backward(batches)
    result = train_step.update()
    return [result.loss, *result.parts.values()], alone


def test_each_loss_of_a_step_is_the_mean_over_its_labels_or_tokens_without_padding():
    losses, alone = zip(*run_ranks(2, losses_of_short_rows, [[16, 9], [5, 12]]), strict=True)
    sums, counts = sum(alone).unbind(1)
    assert counts.tolist() == pytest.approx([38, 34, 42, 42, 38])  # labels, those one further, tokens
    assert losses[0] == losses[1] == pytest.approx((sums / counts).tolist(), abs=1e-5)


WITHOUT_BALANCING = ModelConfig(**{**PRESET, "router_bias_rate": 0})
STEPS = 4


def ids_of(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(4, (2, 17), generator=generator).cumsum(-1) % PRESET["vocab_size"]


def losses_and_norms(ds, compiled):
    train_step = build_train_step(WITHOUT_BALANCING, recipe_of(ds), compiled=compiled)
    results = []
    for step in range(STEPS):
        ids = ids_of(step)
        train_step.forward_backward([Batch(ids[:, :-1], ids[:, 1:])])
        results.append(train_step.update())
    return [result.loss for result in results], [result.grad_norm for result in results]


def losses_and_norms_in_float64(ds):
    """By torch's own optimizer, without DeepSpeed."""
    model = Decoder(WITHOUT_BALANCING).double()
    undecayed = [weight for name, weight in model.named_parameters() if "norm" in name or "latents" in name]
    decayed = [weight for weight in model.parameters() if all(weight is not one for one in undecayed)]
    groups = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    given = ds["optimizer"]["params"]
    optimizer = torch.optim.AdamW(groups, **{key: given[key] for key in ("betas", "eps", "weight_decay")})
    losses, norms = [], []
    for step in range(STEPS):
        ids = ids_of(step)
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), ds["gradient_clipping"])))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * step / 4  # of `ds_config`
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize(
    ("device", "dtype", "compiled"),
    [
        *(("cpu", dtype, False) for dtype in ("fp32", "bf16")),  # compiled there: tests/model/test_compiled.py
        *(on_gpus(1, "cuda", dtype, compiled) for dtype in ("fp32", "bf16") for compiled in (False, True)),
    ],
)
def test_steps_in_fp32_and_bf16_have_the_losses_and_norms_of_torchs_adamw_in_float64(device, dtype, compiled):
    ds = ds_config(2, gradient_clipping=0.5)
    if dtype == "bf16":
        ds |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    ((losses, norms),) = run_ranks(1, losses_and_norms, ds, compiled, device=device)
    exact_losses, exact_norms = losses_and_norms_in_float64(ds)
    share = {"fp32": 1e-5, "bf16": 0.01}[dtype]
    assert losses == pytest.approx(exact_losses, rel=share)
    assert norms == pytest.approx(exact_norms, rel=share)
    assert exact_losses[-1] < exact_losses[1]


def operators_of_an_update(recipe, sums):
    """By name, of the third step of a narrow `tiny` with 64 experts, whose gradients are clipped."""
    narrow = {"num_local_experts": 64, "hidden_size": 64, "head_dim": 16, "intermediate_size": 32, "vocab_size": 96}
    config = load_preset("tiny").model_copy(update=narrow)
    ds = shipped(recipe)
    ds.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, gradient_clipping=0.01)
    if sums:
        ds["data_types"] = {"grad_accum_dtype": sums}
    train_step = build_train_step(config, recipe_of(ds))
    assert len(list(train_step.model.parameters())) == 42
    assert train_step.model.step_losses.dtype == torch.float32  # under bf16 too
    ids = torch.arange(64).unsqueeze(0)
    for _ in range(3):
        train_step.forward_backward([Batch(ids, ids)])
        with Operators() as operators:
            assert train_step.update().grad_norm > 0.01
    return operators.calls


@pytest.mark.parametrize(
    ("recipe", "sums", "most"), [("zero2", None, 60), ("zero2", "bf16", 65), ("zero2_fp32", None, 65)]
)
def test_an_update_has_at_most_so_many_operators_whatever_the_number_of_experts(recipe, sums, most):
    (calls,) = run_ranks(1, operators_of_an_update, recipe, sums)
    assert calls["allreduce_"] == 1
    assert sum(calls.values()) <= most
