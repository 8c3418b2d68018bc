"""A small engine on every rank: train it, save it, load it elsewhere, compare what was saved."""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from toy import PRESET, ds_config, new_store, recipe_of

from megamoe.checkpoint.opening import open_source
from megamoe.checkpoint.restore import restore_first_verified
from megamoe.checkpoint.writer import CheckpointWriter
from megamoe.config.model import ModelConfig
from megamoe.config.optimizers import MASTERS
from megamoe.data.batches import Batch
from megamoe.model.names import plain_parts
from megamoe.training.engine import build_engine
from megamoe.training.step import TrainStep, balancer_of, build_train_step

CONFIG = ModelConfig(**{**PRESET, "num_local_experts": 8})
GATED = CONFIG.model_copy(update={"gated_mlp": True})
EXPERTS = CONFIG.num_local_experts
BATCH = 8  # samples a step, whatever the ranks


class OneWeight(nn.Module):
    """A loss whose gradient is its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.loss_parts = ("cross_entropy",)
        self.register_buffer("step_losses", torch.zeros(1, 2))

    def forward(self, x, documents=None):
        loss = (self.weight * x).sum()
        self.step_losses += torch.stack((loss.detach(), torch.ones(())))
        return loss


def one_weight_engine(schedule=None, **ds_changes):
    """An engine of `OneWeight` by AdamW without weight decay, at a learning rate of 0.1 or by a `schedule`."""
    ds = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "weight_decay": 0.0}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_type": "linear", "warmup_max_lr": 0.1, "warmup_num_steps": 0},
        },
    }
    recipe = recipe_of({**ds, **ds_changes})
    return build_engine(OneWeight(), replace(recipe, schedule=schedule) if schedule else recipe)


def make(ep_size, stage=2, seed=0, config=CONFIG, unchecked=None, **ds_changes):
    """The engine of this rank; keys of DeepSpeed that a run may not have go to it `unchecked`."""
    ds = ds_config(BATCH // dist.get_world_size(), **ds_changes)
    ds["zero_optimization"]["stage"] = stage
    ds["scheduler"]["params"]["total_num_steps"] = 60
    recipe = recipe_of(ds)
    recipe = replace(recipe, json={**recipe.json, **(unchecked or {})})
    return build_train_step(config, recipe, ep_size=ep_size, seed=seed).engine


def batches(seed, *shape):
    """Micro-batches that depend on the seed alone, of `shape` (micro-batches, samples)."""
    ids = torch.randint(4, (*shape, 17), generator=torch.Generator().manual_seed(seed)).cumsum(-1) % CONFIG.vocab_size
    return [Batch(one[:, :-1], one[:, 1:]) for one in ids]


def gradients_given(engine):
    """A list to which go the gradients of each group that the optimizer is given, step by step."""
    inner, given = engine.optimizer.optimizer, []
    inner.register_step_pre_hook(
        lambda *_: given.extend(group["params"][0].grad.clone() for group in inner.param_groups)
    )
    return given


def train(engine, steps, first=0, writer=None, average=None):
    """Train on this rank's share of batches that depend on the step alone; returns the mean losses over all ranks."""
    train_step = TrainStep(engine, balancer_of(engine.module), average)
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        length = 17 + engine.module.config.num_nextn_predict_layers
        ids = torch.randint(4, (BATCH, length), generator=generator).cumsum(1) % CONFIG.vocab_size
        ids = ids.chunk(dist.get_world_size())[dist.get_rank()]
        train_step.forward_backward([Batch(ids[:, :16], ids[:, 1:])])
        if writer:
            writer.before_update()
        losses.append(train_step.update().loss)
    return losses


def writer_for(engine, folder, **options):
    store = options.pop("store", None) or new_store("writer")
    folder.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "model": engine.module.config.model_dump(),
        "deepspeed": {"gradient_clipping": engine.gradient_clipping()},
    }
    return CheckpointWriter(engine, folder, record, store=store, **options)


def save(engine, folder, step):
    writer = writer_for(engine, folder)
    writer.save(step, hold=True)
    assert writer.complete()


def train_and_save(folder, ep_size, stage=2, steps=3, further=0, **ds_changes):
    """Returns the losses of the steps before the save, and of those behind it."""
    engine = make(ep_size, stage, **ds_changes)
    before = train(engine, steps)
    save(engine, folder, steps)
    return before, train(engine, further, steps)


def load_and_train(checkpoint, ep_size, stage=2, steps=0, resave=None, **ds_changes):
    """Returns (step, learning rate) as restored, and the losses of `steps` more."""
    engine = make(ep_size, stage, seed=99, **ds_changes)  # other weights, so that a restore shows
    assert restore_first_verified(engine, [checkpoint]) == checkpoint
    state = engine.global_steps, engine.get_lr()
    if resave:
        save(engine, resave, engine.global_steps)
    return state, train(engine, steps, engine.global_steps)


def plain_state(model):
    """Parameters and buffers of a model, or of a rank's part of it, by plain names, as views."""
    return {
        part.name: tensor.detach().flatten()[part.start : part.start + part.count].view(part.shape)
        for name, tensor in model.state_dict().items()
        for part in plain_parts(name, tuple(tensor.shape), model.topology.first_expert)
    }


def same_state(checkpoint, other):
    """Whether two checkpoints hold the same training state, to the bit."""
    one, two = open_source(checkpoint), open_source(other)
    assert one.shapes == two.shapes
    assert set(one.state_names) == set(two.state_names) != set()
    for name, shape in one.shapes.items():
        assert set(one.state_of(name)) == set(two.state_of(name)) <= set(one.state_names)
        for kind in (MASTERS, *one.state_of(name)):
            values = one.read(name, kind, 0, math.prod(shape))
            assert values.numel() == math.prod(shape)
            assert torch.equal(values, two.read(name, kind, 0, math.prod(shape))), (name, kind)
    assert one.buffers.keys() == two.buffers.keys()
    assert all(torch.equal(value, two.buffers[name]) for name, value in one.buffers.items())
    states = one.training_state(), two.training_state()
    for key in ("global_steps", "global_samples", "skipped_steps", "optimizer_step"):
        assert states[0][key] == states[1][key]
    assert states[0]["lr_scheduler"]["last_epoch"] == states[1]["lr_scheduler"]["last_epoch"]
