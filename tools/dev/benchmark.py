"""How fast megamoe trains, compared with DeepSpeed's own MoE layer, its AutoEP and transformers' Mixtral, on this host.

    python tools/dev/benchmark.py                                 full model, about 20 minutes on two cores
    python tools/dev/benchmark.py --preset tiny --contenders megamoe:1 stock:1 --samples 4 --steps 20       a minute
    python tools/dev/benchmark.py --contenders megamoe:1 megamoe:1@../before          before and after a change
    python tools/dev/benchmark.py --samples 2 4 8 16 --profile    steps of several sizes, until memory ends
    python tools/dev/benchmark.py --growth                        how a step grows with tokens, length, experts, ranks

The contenders take turns, `--rounds` times and in alternating order, so that other load on the host affects all of
them; ratios are medians over the rounds. In each turn the host is measured too: GEMMs at the model's own
shapes, and a copy in memory. `--json` writes everything that was measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from benchmark_contender import Turn
from pydantic import TypeAdapter

from megamoe.config import cli
from megamoe.config.model import ModelConfig, load_preset
from megamoe.config.precision import precision_of
from megamoe.config.recipe import read_recipe
from megamoe.utils.errors import Problems, UserError
from megamoe.utils.json_files import read_json

ROOT = Path(__file__).parents[2]
TURNS = TypeAdapter(list[Turn])
CONTENDER = "benchmark_contender.py"
# In what torch and the libraries below it raise.
OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
NAMES = {
    "megamoe": "megamoe",
    "compiled": "megamoe compiled",
    "stock": "DeepSpeed's MoE layer",
    "autoep": "Mixtral with DeepSpeed's AutoEP",
    "mixtral": "Mixtral of transformers",
}


class ContenderFailed(UserError):
    """A contender has ended before its last size, and not for memory.

    Args:
        turns: of the sizes before.
    """

    def __init__(self, problem: str, turns: list[Turn]):
        super().__init__(problem)
        self.turns = turns


@dataclass(frozen=True)
class Entry:
    """A contender at a size."""

    contender: str
    ranks: int
    preset: str
    samples: tuple[int, ...]  # per step, over all ranks; one size after the other
    seq_len: int
    checkout: Path = ROOT  # whose megamoe and benchmark_contender.py run
    recompute_blocks: int = 0

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks, ep_size {self.ranks}"
        return f"{NAMES[self.contender]}, {ranks}" + (f", of {self.checkout}" if self.checkout != ROOT else "")


def cases_of(args: argparse.Namespace, given: Collection[str], config: ModelConfig, folder: Path) -> dict[str, Entry]:
    """What takes turns, by name. Raises one UserError with all problems."""
    problems = Problems(
        f"--{name} has {number}; give at least 1."
        for name, numbers in (("samples", args.samples), ("rounds", [args.rounds]), ("steps", [args.steps]))
        for number in numbers
        if number < 1
    )
    problems += [f"--growth chooses its own {name}; leave --{name} out." for name in given if args.growth]
    problems.attempt(read_json, Path(args.ds_config))
    if args.json and not args.json.parent.is_dir():
        problems.append(f"--json is {args.json}, whose folder is not there; make it first.")
    samples = tuple(sorted(set(args.samples)))  # those that fit come first
    entries = [problems.attempt(entry_of, word, args.preset, samples, config) for word in args.contenders]
    found = [str(entry) for entry in entries if entry]
    if len(set(found)) < len(found):
        problems.append(f"--contenders has one twice in {' '.join(args.contenders)}; name each once.")
    problems.refuse()
    return growth_entries(args.preset, folder) if args.growth else {str(entry): entry for entry in entries}


def entry_of(word: str, preset: str, samples: tuple[int, ...], config: ModelConfig) -> Entry:
    """The entry that NAME:RANKS or NAME:RANKS@CHECKOUT asks for. Raises UserError."""
    name_and_ranks, _, checkout = word.partition("@")
    name, _, digits = name_and_ranks.partition(":")
    if name not in NAMES or not digits.isdigit() or int(digits) < 1:
        raise UserError(f"--contenders has {word!r}; give NAME:RANKS, NAME one of {', '.join(NAMES)}.")
    ranks = int(digits)
    if name == "mixtral" and ranks > 1:
        raise UserError(f"--contenders has {word!r}; Mixtral is run without DeepSpeed, on 1 rank: give mixtral:1.")
    if name in ("mixtral", "autoep") and importlib.util.find_spec("transformers") is None:
        raise UserError(f"--contenders has {word!r}, which needs transformers; pip install -e '.[bench]'.")
    if any(number % ranks for number in (*samples, config.num_local_experts)):
        raise UserError(
            f"--contenders has {word!r}, but {ranks} ranks cannot share {', '.join(map(str, samples))} samples and the "
            f"{config.num_local_experts} experts of {preset} evenly; give a divisor of both, or other --samples."
        )
    if checkout and contender_of(Path(checkout)) is None:
        raise UserError(
            f"--contenders has {word!r}, but {checkout} has no tools/dev/{CONTENDER}; give a checkout's root."
        )
    length = config.max_position_embeddings
    return Entry(name, ranks, preset, samples, length, Path(checkout).resolve() if checkout else ROOT)


def contender_of(checkout: Path) -> Path | None:
    """The program that trains in a checkout, in tools/dev/ or, before that was there, in tools/."""
    return next(checkout.glob(f"tools/**/{CONTENDER}"), None)


def take_turn(entry: Entry, ds_config: str, steps: int, *flags: str, limit: int = 0) -> list[Turn]:
    """Start the entry's processes and wait for what they measured: a turn for each size for which memory suffices.

    Args:
        flags: `--pieces` and `--profile` of benchmark_contender.py.
        limit: seconds after which the processes are ended; 0 for none.

    Raises ContenderFailed, after it has printed the output.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "turn.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={entry.ranks}"]
        launch = ["timeout", "--kill-after=30", str(limit), *launch]
        words = [str(contender_of(entry.checkout)), entry.contender, str(out),
                 "--preset", entry.preset,
                 "--ds_config", ds_config, "--ep_size", str(entry.ranks), "--samples", *map(str, entry.samples),
                 "--seq_len", str(entry.seq_len), "--steps", str(steps),
                 "--recompute_blocks", str(entry.recompute_blocks)]  # fmt: skip
        threads = max(len(os.sched_getaffinity(0)) // entry.ranks, 1)
        paths = os.pathsep.join(filter(None, (str(entry.checkout), os.environ.get("PYTHONPATH"))))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": paths}
        done = subprocess.run([*launch, *words, *flags], env=environment, capture_output=True, text=True)
        seen = json.loads(out.read_text()) if out.exists() else []
        # A checkout from before several sizes writes one turn.
        turns = TURNS.validate_python([seen] if isinstance(seen, dict) else seen)
        if len(turns) < len(entry.samples):
            if len(entry.samples) > 1 and any(words in done.stderr for words in OUT_OF_MEMORY):
                return turns
            print(done.stderr, file=sys.stderr)
            raise ContenderFailed(f"{entry} ended with code {done.returncode}; its output is above.", turns)
        return turns


def take_turns(
    cases: dict[str, Entry], ds_config: str, rounds: int, steps: int, pieces: bool, profile: bool
) -> list[list[Turn]]:
    """The turns of each case, `rounds` for each of its sizes. A step more of the first round is timed piece by piece
    with `pieces`; one of the smallest size is profiled with `profile`."""
    turns: dict[str, list[Turn]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases) if number % 2 == 0 else reversed(list(cases)):
            entry, flags = cases[name], ["--profile"] * profile
            if pieces and entry.contender in ("megamoe", "stock"):
                flags.append("--pieces")
            found = take_turn(entry, ds_config, steps, *(flags if number == 0 else ()))
            turns[name] += found
            said = [f"{turn.tokens_per_second:.1f} tokens/s" for turn in found]
            if tokens := out_of_memory_at(entry, found):
                said.append(f"out of memory at {tokens:,} tokens per step")
            print(f"round {number + 1}, {name}: {', '.join(said)}", file=sys.stderr, flush=True)
    return list(turns.values())


def out_of_memory_at(entry: Entry, turns: list[Turn]) -> int | None:
    """Tokens per step of the first size that did not fit, if any; `turns` of an entry that has not failed."""
    fitted = len({turn.tokens for turn in turns})
    return entry.samples[fitted] * entry.seq_len if fitted < len(entry.samples) else None


def median(turns: list[Turn], figure: str) -> float:
    return statistics.median(getattr(turn, figure) for turn in turns)


def speed_up(turns: list[Turn], others: list[Turn]) -> float:
    """Median over the rounds of the speed of `turns` over that of `others`."""
    return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in zip(turns, others, strict=True))


def print_summary(entries: list[Entry], turns: list[list[Turn]]) -> None:
    """A row for each entry."""
    machines = [turn.machine for turn in turns[0]]
    rates = [
        statistics.median(getattr(machine, name) for machine in machines)
        for name in ("gemm_flops", "peak_flops", "bandwidth")
    ]
    machine, tokens = machines[0], turns[0][0].tokens
    mfu = "MFU of a measured peak" if machine.peak_is_measured else "MFU"
    print(
        f"\n{machine.device}, {machine.dtype}: GEMMs at the model's shapes {rates[0] / 1e12:.3g} TFLOP/s, "
        f"peak {rates[1] / 1e12:.3g} TFLOP/s{' (measured, of square products)' if machine.peak_is_measured else ''}, "
        f"memory {rates[2] / 1e9:.3g} GB/s\n\n"
        f"| {tokens:,} tokens per step | tokens/s, median and measured | speed-up of {entries[0]} over this row "
        f"| forward and backward, share of the rate of GEMMs | step, {mfu} | optimizer step against bare AdamW "
        "| memory per rank |\n"
        "|---|---|---|---|---|---|---|"
    )
    for entry, own in zip(entries, turns, strict=True):
        measured = ", ".join(f"{turn.tokens_per_second:.0f}" for turn in own)
        print(
            f"| {entry} | {median(own, 'tokens_per_second'):.1f} ({measured}) | {speed_up(turns[0], own):.2f} "
            f"| {median(own, 'gemm_share'):.0%} | {median(own, 'mfu'):.0%} | {median(own, 'update_ratio'):.2f} "
            f"| {median(own, 'memory_gib'):.1f} GiB |"
        )


def seconds_by_piece(turn: Turn) -> dict[str, float]:
    """Seconds of each piece of one step; all but the last make up the step. DeepSpeed copies and reduces the gradients
    of a piece as they come, within that piece's backward."""
    seconds = turn.pieces

    def both(name: str) -> float:
        return seconds.get(f"{name} forward", 0.0) + seconds.get(f"{name} backward", 0.0)

    return {
        "attention": both("attention"),
        "router": both("router"),
        "experts": both("expert"),
        "dispatch and back": both("moe") - both("router") - both("expert"),
        "head, loss, norms, embedding": (seconds["forward and backward"] - both("attention") - both("moe")),
        "optimizer": seconds["update"],
        "collectives, within the above": seconds.get("collectives", 0.0),
    }


def table_of_sizes(names: list[str], turns: list[list[Turn]], ends: list[int | None]) -> str:
    """A row for each size of a step, a column for each case; empty where a size was not measured.

    Args:
        ends: tokens per step for which the memory of a case no longer sufficed.
    """
    lines = [f"| tokens per step | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for tokens in sorted({turn.tokens for own in turns for turn in own}):
        cells = []
        for own, end in zip(turns, ends, strict=True):
            same = [turn for turn in own if turn.tokens == tokens]
            rate, mfu, memory = (
                median(same, name) if same else 0 for name in ("tokens_per_second", "mfu", "memory_gib")
            )
            measured = " of a measured peak" if same and same[0].machine.peak_is_measured else ""
            missing = "out of memory" if end and tokens >= end else ""
            cells.append(f"{rate:,.0f} tokens/s, {mfu:.1%} MFU{measured}, {memory:.1f} GiB" if same else missing)
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_profiles(names: list[str], turns: list[list[Turn]]) -> str:
    """A row for each step that was profiled."""
    lines = [
        "| a profiled step | tokens | step | kernels | device busy | gaps, the largest | waits of the host "
        "| copies to the host | host per kernel |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in zip(names, turns, strict=True):
        for turn in own:
            if seen := turn.profile:
                before = f" before `{short_name(seen.after_largest_gap)}`" if seen.after_largest_gap else ""
                lines.append(
                    f"| {name} | {turn.tokens:,} | {seen.seconds * 1e3:.2f} ms | {seen.kernels:,} "
                    f"| {seen.busy / seen.seconds:.0%} | {seen.gaps.seconds * 1e3:.2f} ms, "
                    f"{seen.largest_gap * 1e3:.2f} ms{before} "
                    f"| {seen.all_waits.count}, {seen.all_waits.seconds * 1e3:.2f} ms | {seen.copies_to_host.count} "
                    f"| {seen.host_per_kernel * 1e6:.1f} us |"
                )
    return "\n".join(lines)


def short_name(kernel: str) -> str:
    """The last name in that of a kernel in C++, without templates and arguments, at most 60 characters."""
    path = re.split(r"[<(]", kernel.replace("(anonymous namespace)::", ""), maxsplit=1)[0]
    return path.rpartition("::")[2].removeprefix("void ").strip()[:60]


def print_pieces(names: list[str], turns: list[list[Turn]]) -> None:
    """The seconds of a step by piece, in the first round; the stock layer counts as dispatch."""
    shown = [(name, own) for name, own in zip(names, turns, strict=True) if own[0].pieces]
    if not shown:
        return
    columns = [seconds_by_piece(own[0]) for _, own in shown]
    print(f"\n| seconds of a step | {' | '.join(name for name, _ in shown)} |\n|---|{'---|' * len(shown)}")
    for name in columns[0]:
        cells = [f"{pieces[name]:.2f}" for pieces in columns]
        print(f"| {name} | {' | '.join(cells)} |")


def growth_entries(preset: str, folder: Path) -> dict[str, Entry]:
    """Two layers of the preset, each size changed alone."""
    config = load_preset(preset)

    def entry(samples: int = 2, seq_len: int = 1024, experts: int = config.num_local_experts, ranks: int = 1) -> Entry:
        path = folder / f"experts_{experts}_{seq_len}.json"
        changed = {"num_hidden_layers": 2, "num_local_experts": experts, "max_position_embeddings": seq_len}
        path.write_text(json.dumps({**config.model_dump(), **changed}))
        return Entry("megamoe", ranks, str(path), (samples,), seq_len)

    cases = {f"2 x 1,024 tokens, {config.num_local_experts} experts, 1 rank": entry()}
    cases |= {f"{samples:,} x 1,024 tokens": entry(samples=samples) for samples in (1, 4, 8)}
    cases |= {f"{2048 // length} x {length:,} tokens": entry(2048 // length, length) for length in (256, 512, 2048)}
    counts = [config.num_local_experts * factor // 2 for factor in (1, 4, 8)]
    cases |= {f"{experts} experts": entry(experts=experts) for experts in counts}
    recomputed = replace(entry(), recompute_blocks=2)
    return cases | {"2 ranks, ep_size 2": entry(ranks=2), "both blocks recomputed": recomputed}


def print_growth(names: list[str], turns: list[list[Turn]]) -> None:
    print("\n| two layers | seconds per step | over the first | tokens/s | memory per rank |\n|---|---|---|---|---|")
    for name, own in zip(names, turns, strict=True):
        ratio = statistics.median(a.step_seconds / b.step_seconds for a, b in zip(own, turns[0], strict=True))
        seconds, rate, memory = (median(own, name) for name in ("step_seconds", "tokens_per_second", "memory_gib"))
        print(f"| {name} | {seconds:.2f} | {ratio:.2f} | {rate:.0f} | {memory:.2f} GiB |")


def resolved_file(ds_config: str, folder: Path) -> str:
    """A DeepSpeed JSON in `folder` with the precision that this device is good at, for all turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision_of(device)
    recipe = read_recipe(ds_config, 1, device.type == "cpu", precision.choice)
    if note := precision.describe(recipe):
        print(note, file=sys.stderr)
    path = folder / "ds_config.json"
    path.write_text(json.dumps(recipe.json))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Time a training step against DeepSpeed's MoE layer and transformers' Mixtral.",
    )
    parser.add_argument("--preset", default="moe-680m", help="the model")
    parser.add_argument("--ds_config", default=str(ROOT / "ds_configs" / "zero2.json"), help="DeepSpeed JSON")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["megamoe:1", "compiled:1", "megamoe:2", "stock:1", "mixtral:1"],
        metavar="NAME:RANKS[@CHECKOUT]",
        help="NAME is megamoe, compiled (megamoe with --compile), stock (DeepSpeed's layer), autoep (a Mixtral with "
        "DeepSpeed's AutoEP) or mixtral; @CHECKOUT runs another checkout's megamoe and benchmark_contender.py; the "
        "first is compared with the others",
    )
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[2], help="sequences per step, over all ranks (not the JSON's)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="turns that each takes")
    parser.add_argument("--steps", type=int, default=2, help="steps timed in a turn, after two that are not")
    parser.add_argument("--profile", action="store_true", help="profile one more step of the smallest size")
    parser.add_argument("--growth", action="store_true", help="measure how a step grows instead")
    parser.add_argument("--json", type=Path, help="file to write all measurements to")
    args = parser.parse_args()
    given = [name for name in ("contenders", "samples") if getattr(args, name) is not parser.get_default(name)]
    config = load_preset(args.preset)
    with tempfile.TemporaryDirectory() as folder:
        cases = cases_of(args, given, config, Path(folder))
        ds_config = resolved_file(args.ds_config, Path(folder))
        one_size = not args.growth and len(args.samples) == 1
        turns = take_turns(cases, ds_config, args.rounds, args.steps, pieces=one_size, profile=args.profile)
    if args.growth:
        print_growth(list(cases), turns)
    elif one_size:
        print_summary(list(cases.values()), turns)
        print_pieces(list(cases), turns)
    else:
        ends = [out_of_memory_at(entry, own) for entry, own in zip(cases.values(), turns, strict=True)]
        print(f"\n{table_of_sizes(list(cases), turns, ends)}")
    if args.profile:
        print(f"\n{table_of_profiles(list(cases), turns)}")
    if args.json:
        seen = {name: [asdict(turn) for turn in own] for name, own in zip(cases, turns, strict=True)}
        args.json.write_text(json.dumps(seen, indent=2))


if __name__ == "__main__":
    cli.run(main)
