# SPDX-License-Identifier: Apache-2.0
"""The denoiser of one step for M adapters, in any family; `latency.py --size` runs it.

    python benchmarks/latency.py --model flux --size cpu --objectives 2
    python benchmarks/latency.py --model sd3 --size tiny --contenders "rows,ours,turns,mixed"

Every way is checked against the objectives one after another in a wider dtype before anything is
timed. Then all take turns, forward by forward. Appends to latency-families.jsonl in `--results`.
"""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatchcase

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.contenders import families
from benchmarks.contenders.contender import Impossible, Unverified
from benchmarks.contenders.families import Denoiser
from benchmarks.contenders.loop import hidden_axis
from benchmarks.contenders.together import WAYS, exact, verify
from benchmarks.harness import append, in_turn, interleaved, operators, summary, surroundings

__all__ = ["main"]

RANK = 32


def main(args: argparse.Namespace, dtype: torch.dtype) -> int:
    """Measure with the arguments of `latency.py`, and return the exit status."""
    for name in ("torch._dynamo", "diffusers"):  # diffusers: networks are cast whole, and back
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(0)
    console = Console(width=max(Console().width, 120))
    rank = RANK if args.rank is None else args.rank
    denoiser = families.load(
        args.model,
        args.size,
        count=max(args.objectives),
        rank=rank,
        device=torch.device(args.device),
        dtype=dtype,
    )
    for count in args.objectives:
        try:
            records = measure(args, denoiser, count, rank, dtype)
        except Unverified as error:
            print(error, file=sys.stderr)
            return 1
        args.results.mkdir(parents=True, exist_ok=True)
        append(str(args.results.resolve() / "latency-families"), records)
        show(console, records)
    return 0


def timed(
    runs: dict[str, Callable[[], Tensor]], rounds: int, device: str
) -> dict[str, dict[str, float]]:
    """Time interleaved rounds; ratios to the base network on the same rows are medians of theirs.

    On the CPU those of processor time, of all threads, too. With one thread, other processes do not
    add to it; several wait for each other by spinning.
    """
    spent: dict[str, list[float]] = {name: [] for name in runs}

    def noted(name: str, run: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            start = time.process_time()
            run()
            spent[name].append(time.process_time() - start)

        return call

    times = in_turn({name: noted(name, run) for name, run in runs.items()}, rounds, device)
    found = {}
    for name, own in times.items():
        found[name] = summary(own)
        if "rows" in times:
            found[name]["ratio"] = between(own, times["rows"])
            if device == "cpu":
                found[name]["cpu_ratio"] = between(spent[name][-rounds:], spent["rows"][-rounds:])
    return found


def between(own: list[float], rows: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(own, rows, strict=True)), 4)


@torch.no_grad()
def measure(
    args: argparse.Namespace, denoiser: Denoiser, count: int, rank: int, dtype: torch.dtype
) -> list[dict[str, object]]:
    """Return one record per way; those that were skipped have the reason."""
    outputs, patterns = exact(denoiser, count), args.contenders.split(",")
    runs: dict[str, Callable[[], Tensor]] = {}
    facts: dict[str, dict[str, object]] = {name: {"title": way.title} for name, way in WAYS.items()}
    with ExitStack() as stack:
        for name, way in WAYS.items():
            if not any(fnmatchcase(name, pattern) for pattern in patterns):
                continue
            try:
                runs[name] = way.make(denoiser, count, stack)
            except Impossible as error:
                facts[name]["skipped"] = str(error)
                continue
            facts[name]["error"] = float(f"{verify(way, runs[name], outputs, dtype):.3g}")
            if args.device == "cpu" and "compiled" not in name:
                facts[name] |= operators(runs[name])
        timings = timed(runs, args.rounds, args.device)
        loop = interleaved(hidden_axis(stack), 1.0)
    shared = surroundings(args.device) | {
        "device": args.device,
        "model": args.model,
        "size": args.size,
        "parameters": denoiser.parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "num_objectives": count,
        "rank": rank,
        "hidden_axis_us": round(loop["hidden"]["median_us"] - loop["plain"]["median_us"], 1),
    }
    return [
        shared | {"contender": name} | fact | timings.get(name, {})
        for name, fact in facts.items()
        if name in timings or "skipped" in fact
    ]


def show(console: Console, records: list[dict]) -> None:
    """Print the ways with their ratios, then what was skipped and why."""
    first = records[0]
    table = Table(
        title=f"{first['model']}, {first['size']}: {first['parameters'] / 1e6:.0f} million "
        f"parameters, M = {first['num_objectives']}, rank {first['rank']}, {first['dtype']}, "
        f"{first.get('gpu', first['machine'])}, {first['threads']} threads, load {first['load']}",
        title_justify="left",
    )
    table.add_column("way", no_wrap=True)
    for column in ("ms", "p20 - p80", "/ rows", "processor", "operators", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for record in records:
        if "skipped" in record:
            table.add_row(record["contender"], record["skipped"])
            continue
        table.add_row(
            f"{record['contender']}: {record['title']}",
            f"{record['median_us'] / 1e3:.2f}",
            f"{record['p20_us'] / 1e3:.2f} - {record['p80_us'] / 1e3:.2f}",
            *(f"{record[key]:.3f}" if key in record else "" for key in ("ratio", "cpu_ratio")),
            str(record.get("operators", "")),
            f"{record['error']:.1e}",
        )
    console.print(table)
    console.print(
        f"{records[0].get('rounds')} interleaved rounds; ratios are medians of those of each "
        f"round. A hidden objective axis adds {first['hidden_axis_us']:.0f} us to a step of a loop."
    )
