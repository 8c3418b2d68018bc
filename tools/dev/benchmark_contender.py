"""Steps of one contender, timed; started by benchmark.py, once per turn, as as many processes as it has ranks.

With several sizes of a step, one after the other; memory may end before the last.

Contenders: "megamoe", "compiled" (megamoe with compiled blocks), "stock" (the same model with DeepSpeed's own MoE
layer, drop_tokens=False), "mixtral" (transformers' MixtralForCausalLM of the same size and FLOPs, torch's fused
AdamW, no DeepSpeed) and "autoep" (that Mixtral in DeepSpeed's engine, its experts split by AutoEP).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmark_models import Contender, build_autoep, build_engine_contender, build_mixtral
from step_profile import StepProfile, profile_step
from torch import nn

from megamoe.config.model import ModelConfig, load_preset
from megamoe.config.precision import precision_of
from megamoe.launch.distributed import init_distributed
from megamoe.model.costs import train_flops_per_token
from megamoe.model.moe import MoE
from megamoe.model.topology import ExpertTopology
from megamoe.utils.hardware import measured_bandwidth, memory_gib

COLLECTIVES = ("all_to_all_single", "all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor")
HEAD_ROWS = 512  # tokens whose logits are computed at a time
TRIALS = 3  # of a GEMM; the fastest counts
WARM_UP = 2  # steps in which kernels are chosen, memory and moments are made


class Clock:
    """Seconds by name; waits for the device at both ends, so that a piece has all of its work and nothing else."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._started: dict[Any, float] = {}

    def start(self, key: Any) -> None:
        self._started[key] = self._now()

    def stop(self, key: Any, name: str) -> None:
        if key in self._started:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - self._started.pop(key)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        self.start(name)
        yield
        self.stop(name, name)

    def timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, measured at each call."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.measure(name):
                return function(*args, **kwargs)

        return call

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def gemm_flops(config: ModelConfig, tokens: int, ep_size: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s over the GEMMs of one layer and its share of the head, forward and both backward ones, at the
    shapes of a step with `tokens` tokens on a rank and balanced experts."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    experts, inside = ExpertTopology(config.num_local_experts, ep_size).experts_per_rank, config.expert_size
    rows = tokens * config.num_experts_per_tok // experts
    chunk = min(HEAD_ROWS, tokens)
    products = [  # rows, in, out, times a layer
        (tokens, hidden, heads, 2.0),
        (tokens, hidden, key_value, 2.0),
        (rows, hidden, inside, experts),
        (rows, inside, hidden, experts),
        (chunk, hidden, config.vocab_size, tokens / chunk / config.num_hidden_layers),
    ]
    flops = seconds = 0.0
    for m, k, n, times in products:
        x, w, g = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((m, k), (n, k), (m, n)))
        for a, b in ((x, w.T), (g, w), (g.T, x)):
            seconds += times * min(timed(torch.mm, a, b, device=device) for _ in range(TRIALS))
            flops += times * 2 * m * k * n
    return flops / seconds


def timed(function: Callable[..., Any], *args: Any, device: torch.device) -> float:
    """Seconds of one call."""
    clock = Clock(device)
    clock.timing("call", function)(*args)
    return clock.seconds["call"]


@contextmanager
def timed_update(contender: Contender, clock: Clock) -> Iterator[None]:
    """Time the step of torch's optimizer inside the engine's: the bare update over the same bytes."""
    plain = contender.optimizer.step
    contender.optimizer.step = clock.timing("bare optimizer", plain)  # type: ignore[method-assign]
    yield
    contender.optimizer.step = plain  # type: ignore[method-assign]


def pieces_of(block: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a block that are timed; the stock layer is one piece."""
    yield "attention", block.self_attn
    yield "moe", block.moe
    if isinstance(block.moe, MoE):
        yield "router", block.moe.router
        yield "expert", block.moe.experts


@contextmanager
def timed_pieces(model: nn.Module, clock: Clock) -> Iterator[None]:
    """Time the forward and backward of each kind of piece, by hooks, and the collectives within them."""
    handles = []
    for block in model.layers:  # type: ignore[union-attr]
        for name, module in pieces_of(block):
            for way, before, after in (
                ("forward", module.register_forward_pre_hook, module.register_forward_hook),
                ("backward", module.register_full_backward_pre_hook, module.register_full_backward_hook),
            ):
                key = (id(module), way)
                handles.append(before(lambda *_, key=key: clock.start(key)))  # type: ignore[misc]
                handles.append(after(lambda *_, key=key, name=f"{name} {way}": clock.stop(key, name)))  # type: ignore[misc]
    plain = {name: getattr(dist, name) for name in COLLECTIVES}
    for name in COLLECTIVES:
        setattr(dist, name, clock.timing("collectives", plain[name]))
    yield
    for name, function in plain.items():
        setattr(dist, name, function)
    for handle in handles:
        handle.remove()


@dataclass(frozen=True)
class Machine:
    """What the devices of all ranks reach together, all of them at work."""

    gemm_flops: float  # on the model's own shapes
    peak_flops: float  # the data sheet's where the device is known, else of square products, in the faster dtype
    bandwidth: float  # bytes/s
    device: str
    dtype: str
    peak_is_measured: bool = False  # a version before does not say


@dataclass
class Turn:
    """What one turn saw on rank 0; lists have a value for each step."""

    tokens: int  # per step, over all ranks
    flops: float  # per step, forward and backward
    machine: Machine
    forward_backward: list[float]  # seconds
    update: list[float]
    bare_update: list[float]  # within update: torch's optimizer
    memory_gib: float  # at most, in the steps
    pieces: dict[str, float] = field(default_factory=dict)  # seconds in one step that was timed piece by piece
    profile: StepProfile | None = None  # of one more step of the smallest size

    @property
    def step_seconds(self) -> float:
        return statistics.median(a + b for a, b in zip(self.forward_backward, self.update, strict=True))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def gemm_share(self) -> float:
        """FLOP/s of forward and backward over that of the bare products."""
        return self.flops / statistics.median(self.forward_backward) / self.machine.gemm_flops

    @property
    def mfu(self) -> float:
        return self.flops / self.step_seconds / self.machine.peak_flops

    @property
    def update_ratio(self) -> float:
        return statistics.median(self.update) / statistics.median(self.bare_update)


def measure_machine(
    config: ModelConfig, tokens: int, ep_size: int, device: torch.device, dtype: torch.dtype
) -> Machine:
    """With `tokens` on each rank. Collective."""
    dist.barrier()
    gemm = gemm_flops(config, tokens, ep_size, device, dtype)
    peak, bandwidth = precision_of(device).mfu_peak(device, dtype), measured_bandwidth(device)
    ranks = dist.get_world_size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Machine(
        ranks * gemm, ranks * peak.flops, ranks * bandwidth, name, str(dtype).removeprefix("torch."), peak.is_measured
    )


def restart_peak(device: torch.device) -> None:
    """Forget what building and the first steps took at most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak of the resident set


def peak_gib(device: torch.device) -> float:
    """Peak memory of this rank since `restart_peak`: allocated on the accelerator, or resident on CPU."""
    if device.type == "cuda":
        return memory_gib(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def run(args: argparse.Namespace) -> Iterator[Turn]:
    """A turn for each size of a step."""
    _, device = init_distributed()
    config = load_preset(args.preset)
    samples = args.samples[0] // dist.get_world_size()
    if args.contender == "mixtral":
        contender = build_mixtral(config, args.ds_config, device)
    elif args.contender == "autoep":
        contender = build_autoep(config, args.ds_config, args.ep_size, samples)
    else:
        contender = build_engine_contender(
            config, args.ds_config, args.ep_size, samples, args.recompute_blocks,
            stock=args.contender == "stock", compiled=args.contender == "compiled",
        )  # fmt: skip
    for samples in args.samples:
        torch.compiler.reset()  # or it would compile the next size for any size, which no run with one size has
        yield take_turn(contender, config, samples, args, device)


def take_turn(
    contender: Contender, config: ModelConfig, samples: int, args: argparse.Namespace, device: torch.device
) -> Turn:
    """Time steps of `samples` sequences, over all ranks. Collective."""
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(config.vocab_size, (samples // dist.get_world_size(), args.seq_len), device=device)

    def step(clock: Clock) -> None:
        dist.barrier()
        with clock.measure("forward and backward"):
            contender.forward_backward(ids)
        with clock.measure("update"), timed_update(contender, clock):
            contender.update()

    for _ in range(WARM_UP):
        step(Clock(device))
    restart_peak(device)
    clocks = [Clock(device) for _ in range(args.steps)]
    for clock in clocks:
        step(clock)
    memory = peak_gib(device)
    tokens = samples * args.seq_len
    turn = Turn(
        tokens=tokens,
        flops=train_flops_per_token(config, args.seq_len) * tokens,
        machine=measure_machine(config, ids.numel(), args.ep_size, device, contender.dtype),
        forward_backward=[clock.seconds["forward and backward"] for clock in clocks],
        update=[clock.seconds["update"] for clock in clocks],
        bare_update=[clock.seconds["bare optimizer"] for clock in clocks],
        memory_gib=memory,
    )
    if args.pieces:
        clock = Clock(device)
        with timed_pieces(contender.model, clock):
            step(clock)
        turn.pieces = clock.seconds
    if args.profile and samples == args.samples[0]:

        def plain_step() -> None:
            contender.forward_backward(ids)
            contender.update()

        turn.profile = profile_step(plain_step, device)
    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description="One turn of one contender; benchmark.py starts it.")
    parser.add_argument("contender", choices=("megamoe", "compiled", "stock", "autoep", "mixtral"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--ds_config", required=True)
    parser.add_argument("--ep_size", type=int, required=True)
    parser.add_argument("--samples", type=int, nargs="+", required=True)
    parser.add_argument("--seq_len", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--recompute_blocks", type=int, default=0)
    parser.add_argument("--pieces", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    turns = []
    for turn in run(args):
        turns.append(asdict(turn))
        if dist.get_rank() == 0:
            args.out.write_text(json.dumps(turns))  # each time: the next size may not fit
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
