"""How fast megamoe trains, beside DeepSpeed's own MoE layer and transformers' Mixtral, on this machine.

    python tools/benchmark.py                                 full model, about ten minutes on two cores
    python tools/benchmark.py --preset tiny --contenders megamoe:1 stock:1 --samples 4 --steps 10       a minute
    python tools/benchmark.py --growth                        how a step grows with tokens, length, experts, ranks

The contenders take turns, `--rounds` times and in alternating order, so that what else the machine does meets all of
them; ratios are medians over the rounds. In each turn the machine is measured too: matrix products at the model's own
shapes, and a copy in memory. `--json` writes everything that was seen.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from benchmark_contender import Machine, Turn, gemm_flops

from megamoe import cli
from megamoe.config import ModelConfig, UserError, load_preset

ROOT = Path(__file__).parents[1]
NAMES = {"megamoe": "megamoe", "stock": "DeepSpeed's MoE layer", "mixtral": "Mixtral of transformers"}


@dataclass(frozen=True)
class Entry:
    """A contender at a size."""

    contender: str
    ranks: int
    preset: str
    samples: int  # a step, over all ranks
    seq_len: int

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks, ep_size {self.ranks}"
        return f"{NAMES[self.contender]}, {ranks}"


def entry_of(word: str, preset: str, samples: int, seq_len: int) -> Entry:
    """The entry that NAME:RANKS asks for. Raises UserError."""
    name, _, ranks = word.partition(":")
    if name not in NAMES or not ranks.isdigit() or int(ranks) < 1:
        raise UserError(f"--contenders has {word!r}; give NAME:RANKS, NAME one of {', '.join(NAMES)}.")
    if name == "mixtral" and ranks != "1":
        raise UserError(f"--contenders has {word!r}; Mixtral is run without DeepSpeed, on 1 rank: give mixtral:1.")
    if name == "mixtral" and importlib.util.find_spec("transformers") is None:
        raise UserError(f"--contenders has {word!r}, which needs transformers; pip install -e '.[bench]'.")
    if samples % int(ranks):
        raise UserError(f"--samples is {samples}, which {word!r} cannot split over {ranks} ranks; give a multiple.")
    return Entry(name, int(ranks), preset, samples, seq_len)


def take_turn(entry: Entry, ds_config: str, steps: int, pieces: bool) -> Turn:
    """Start the entry's processes and wait for what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "turn.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={entry.ranks}"]
        words = [str(ROOT / "tools/benchmark_contender.py"), entry.contender, str(out), "--preset", entry.preset,
                 "--ds_config", ds_config, "--ep_size", str(entry.ranks), "--samples", str(entry.samples),
                 "--seq_len", str(entry.seq_len), "--steps", str(steps)]  # fmt: skip
        threads = max(len(os.sched_getaffinity(0)) // entry.ranks, 1)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        done = subprocess.run(launch + words + ["--pieces"] * pieces, env=environment, capture_output=True, text=True)
        if not out.exists():
            raise UserError(f"{entry} ended with code {done.returncode}; its last words: {done.stderr[-2000:]}")
        seen = json.loads(out.read_text())
        return Turn(**{**seen, "machine": Machine(**seen["machine"])})


def take_turns(entries: list[Entry], ds_config: str, rounds: int, steps: int, pieces: bool) -> list[list[Turn]]:
    """The turns of each entry, `rounds` each."""
    turns: list[list[Turn]] = [[] for _ in entries]
    for number in range(rounds):
        order = list(range(len(entries)))
        for place in order if number % 2 == 0 else reversed(order):
            turn = take_turn(entries[place], ds_config, steps, pieces and entries[place].contender != "mixtral")
            turns[place].append(turn)
            print(f"round {number + 1}, {entries[place]}: {turn.tokens_per_second:.1f} tokens/s", file=sys.stderr)
    return turns


def median(turns: list[Turn], figure: str) -> float:
    return statistics.median(getattr(turn, figure) for turn in turns)


def times_as_fast(turns: list[Turn], others: list[Turn]) -> float:
    """Median over the rounds of how many times as fast `turns` were."""
    return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in zip(turns, others, strict=True))


def print_summary(entries: list[Entry], turns: list[list[Turn]]) -> None:
    """A row for each entry."""
    machines = [turn.machine for turn in turns[0]]
    rates = [
        statistics.median(getattr(machine, name) for machine in machines)
        for name in ("gemm_flops", "peak_flops", "bandwidth")
    ]
    print(
        f"\n{machines[0].device}, {machines[0].dtype}: matrix products at the model's shapes {rates[0] / 1e12:.3g} "
        f"TFLOP/s, peak {rates[1] / 1e12:.3g} TFLOP/s, memory {rates[2] / 1e9:.3g} GB/s\n\n"
        f"| {turns[0][0].tokens:,} tokens a step | tokens/s | {entries[0]} is faster by | forward and backward, share "
        "of the rate of products | step, MFU | optimizer step against bare AdamW | memory a rank |\n"
        "|---|---|---|---|---|---|---|"
    )
    for entry, own in zip(entries, turns, strict=True):
        print(
            f"| {entry} | {median(own, 'tokens_per_second'):.1f} | {times_as_fast(turns[0], own):.2f} "
            f"| {median(own, 'gemm_share'):.0%} | {median(own, 'mfu'):.0%} | {median(own, 'update_ratio'):.2f} "
            f"| {median(own, 'memory_gib'):.1f} GiB |"
        )


def seconds_by_piece(turn: Turn) -> dict[str, float]:
    """Seconds of each piece of one step; all but the last make up the step."""
    seconds = turn.pieces

    def both(name: str) -> float:
        return seconds.get(f"{name} forward", 0.0) + seconds.get(f"{name} backward", 0.0)

    return {
        "attention": both("attention"),
        "router": both("router"),
        "experts": both("expert"),
        "dispatch and back": both("moe") - both("router") - both("expert"),
        "head, loss, norms, embedding, gradients' reduction": (
            seconds["forward and backward"] - both("attention") - both("moe")
        ),
        "optimizer": seconds["update"],
        "collectives, within the above": seconds.get("collectives", 0.0),
    }


def print_pieces(entries: list[Entry], turns: list[list[Turn]]) -> None:
    """Where a step's seconds go; the stock layer's router and experts are within its dispatch."""
    shown = [(entry, own) for entry, own in zip(entries, turns, strict=True) if own[0].pieces]
    if not shown:
        return
    columns = [[seconds_by_piece(turn) for turn in own] for _, own in shown]
    print(f"\n| seconds of a step | {' | '.join(str(entry) for entry, _ in shown)} |\n|---|{'---|' * len(shown)}")
    for name in columns[0][0]:
        cells = [f"{statistics.median(pieces[name] for pieces in column):.2f}" for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")


def growth_entries(preset: str, folder: Path) -> dict[str, Entry]:
    """Two layers of the preset, each size changed alone."""
    config = load_preset(preset)

    def entry(samples: int = 2, seq_len: int = 1024, experts: int = config.num_local_experts, ranks: int = 1) -> Entry:
        path = folder / f"experts_{experts}_{seq_len}.json"
        changed = {"num_hidden_layers": 2, "num_local_experts": experts, "max_position_embeddings": seq_len}
        path.write_text(json.dumps({**config.model_dump(), **changed}))
        return Entry("megamoe", ranks, str(path), samples, seq_len)

    cases = {"2 x 1,024 tokens, 8 experts, 1 rank": entry()}
    cases |= {f"{samples:,} x 1,024 tokens": entry(samples=samples) for samples in (1, 4, 8)}
    cases |= {f"{2048 // length} x {length:,} tokens": entry(2048 // length, length) for length in (256, 512, 2048)}
    cases |= {f"{experts} experts": entry(experts=experts) for experts in (4, 16, 32)}
    return cases | {"2 ranks, ep_size 2": entry(ranks=2)}


def print_growth(names: list[str], turns: list[list[Turn]]) -> None:
    print("\n| two layers | seconds a step | against the first | tokens/s |\n|---|---|---|---|")
    for name, own in zip(names, turns, strict=True):
        ratio = statistics.median(a.step_seconds / b.step_seconds for a, b in zip(own, turns[0], strict=True))
        print(f"| {name} | {median(own, 'step_seconds'):.2f} | {ratio:.2f} | {median(own, 'tokens_per_second'):.0f} |")


def faster_config(config: ModelConfig) -> str:
    """The recipe of the dtype whose matrix products are faster here: not every processor has units for bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = {dtype: gemm_flops(config, 2048, device, dtype) for dtype in (torch.bfloat16, torch.float32)}
    print(", ".join(f"{dtype}: {rate / 1e12:.3g} TFLOP/s" for dtype, rate in rates.items()), file=sys.stderr)
    half = rates[torch.bfloat16] >= rates[torch.float32]
    return str(ROOT / "ds_configs" / ("zero2.json" if half else "zero2_fp32.json"))


def main() -> None:
    parser = cli.Parser(description="Time a training step against DeepSpeed's MoE layer and transformers' Mixtral.")
    parser.add_argument("--preset", default="moe-680m", help="the model")
    parser.add_argument("--ds_config", help="DeepSpeed JSON; the default is the recipe whose products are faster here")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["megamoe:1", "megamoe:2", "stock:1", "mixtral:1"],
        metavar="NAME:RANKS",
        help=f"of {', '.join(NAMES)}; the first is compared with the others",
    )
    parser.add_argument("--samples", type=int, default=2, help="sequences a step, over all ranks")
    parser.add_argument("--rounds", type=int, default=2, help="turns that each takes")
    parser.add_argument("--steps", type=int, default=2, help="steps timed in a turn, after two that are not")
    parser.add_argument("--growth", action="store_true", help="measure how a step grows instead")
    parser.add_argument("--json", type=Path, help="file to write all that was seen to")
    args = parser.parse()
    config = load_preset(args.preset)
    ds_config = args.ds_config or faster_config(config)
    with tempfile.TemporaryDirectory() as folder:
        if args.growth:
            cases = growth_entries(args.preset, Path(folder))
        else:
            length = config.max_position_embeddings
            entries = [entry_of(word, args.preset, args.samples, length) for word in args.contenders]
            cases = {str(entry): entry for entry in entries}
        turns = take_turns(list(cases.values()), ds_config, args.rounds, args.steps, pieces=not args.growth)
    if args.growth:
        print_growth(list(cases), turns)
    else:
        print_summary(entries, turns)
        print_pieces(entries, turns)
    if args.json:
        seen = {name: [asdict(turn) for turn in own] for name, own in zip(cases, turns, strict=True)}
        args.json.write_text(json.dumps(seen, indent=2))


if __name__ == "__main__":
    cli.run(main)
