# SPDX-License-Identifier: Apache-2.0
"""Measure what shared batches bring a server: throughput and latency under load, over HTTP.

    python benchmarks/serving.py             # ten minutes, shipped model, T = 25
    python benchmarks/serving.py --quick     # one minute, T = 2: tests the benchmark, not the speed

Three servers on this machine take turns, each idle while another one is loaded; all get the same
requests at the same times, with preference weights chosen from `--weights` vectors:

- `off`: `msdda-fast serve --max-batch 1`
- `mixed`: `msdda-fast serve`, where requests of any weights share a batch
- `one weight`: the same server, but a batch has requests of equal weights only

First, images from full batches are compared with images drawn alone. Then each server is measured
at four times its capacity, for throughput, and at fixed fractions of the capacities of `off` and
`mixed`, for latency. Arrivals are Poisson; times count from when a request was due.

Appends to results/serving.jsonl and draws results/serving.png; `benchmarks/report.py` makes the
table of docs/results.md.
"""

import argparse
import asyncio
import os
import random
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import torch

import msdda_fast as mf
from benchmarks import load, serving_output
from benchmarks.contenders.servers import ARMS, Server, verify
from benchmarks.harness import RESULTS, append, interleaved, surroundings
from benchmarks.serving_cell import Cell
from msdda_fast.batching.admission import Admission
from msdda_fast.batching.drawing import BatchDrawer
from msdda_fast.batching.limits import Limits
from msdda_fast.emoji.prompts import TEST_PROMPTS

#: Name of a rate, the arm whose capacity it is a fraction of, the fraction.
RATES = {
    "0.5 off": ("off", 0.5),
    "0.8 off": ("off", 0.8),
    "0.8 mixed": ("mixed", 0.8),
}
OVERLOAD = 4.0
#: More than this many cores taken by other processes make a run noisy.
NOISY = 0.1


def requests(count: int, names: list[str], vectors: int, seed: int) -> list[dict]:
    """Return bodies with random prompts and seeds, and one of `vectors` preferences each."""
    rng = random.Random(seed)
    simplex = random.Random(0)
    grid = []
    for _ in range(vectors):
        parts = [simplex.expovariate(1) for _ in names]
        grid.append({n: p / sum(parts) for n, p in zip(names, parts, strict=True)})
    return [
        {
            "prompt": rng.choice(TEST_PROMPTS),
            "seed": rng.getrandbits(32),
            "weights": rng.choice(grid),
        }
        for _ in range(count)
    ]


def curve(pipe, sizes: list[int], steps: int, seconds: float) -> list[dict]:
    """Measure the time per image of a whole batch, text to pixels, without a server."""
    drawing = BatchDrawer(pipe)
    limits = Limits.check(
        max_batch=max(sizes), max_wait_ms=0, queue_limit=max(sizes), client_limit=None,
        max_pixels=2**22, max_cost=2**30, batch_sizes=None,
    )  # fmt: skip
    admission = Admission(drawing.pipe, limits)

    def batch(size):
        tickets = [
            admission.tickets(
                mf.ImageRequest(TEST_PROMPTS[i], seed=i, num_inference_steps=steps)
            )[0]
            for i in range(size)
        ]  # fmt: skip

        def run():
            x_0 = drawing.sample(tickets, size=size, watch=lambda *_: True)
            drawing.decode(x_0, "pil")

        return run

    timings = interleaved({str(size): batch(size) for size in sizes}, seconds)
    return [
        {"kind": "batch", "batch": size, "image_ms": round(t["median_us"] / 1e3 / size, 2)} | t
        for size, t in ((size, timings[str(size)]) for size in sizes)
    ]


def measure(args: argparse.Namespace) -> list[dict]:
    """Run the whole benchmark and return its records."""
    machine = surroundings()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    pipe = mf.MSDDAPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    names = list(pipe.objectives)
    budget = args.minutes * 60
    print(f"time per image by batch size, {args.threads} threads")
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= args.max_batch]
    records = curve(pipe, sizes, args.steps, 0.08 * budget)
    for record in records:
        print(f"  {record['batch']}: {record['image_ms']:.1f} ms")
    bodies = requests(5000, names, args.weights, args.seed)
    with ExitStack() as stack:
        servers = {}
        for arm in ARMS:  # in turn: loading is noise to none of them
            servers[arm] = stack.enter_context(Server(arm, args))
            servers[arm].wait()
        different = requests(args.max_batch, names, 1000, args.seed)
        checked = verify(pipe, servers, different, args.steps)
        print(f"levels of 255 from the image drawn alone: {checked}")
        cells = loads(servers, bodies, args, 0.85 * budget)
    records += [cell.record() | {"levels_apart": checked[cell.arm]} for cell in cells]
    noise = max(record.get("foreign_cores", 0.0) for record in records)
    shared = machine | {
        "threads": args.threads, "model": args.model, "steps": args.steps, "seed": args.seed,
        "objectives": names, "weights": args.weights, "max_batch": args.max_batch,
        "queue_limit": args.queue_limit, "rounds": args.rounds, "is_quick": args.quick,
        "noisy": noise > NOISY,
    }  # fmt: skip
    return [shared | record for record in records]


def loads(servers, bodies, args, seconds) -> list[Cell]:
    """In every round, overload every arm, then offer the rates that follow from its capacity."""
    cells = {(arm, rate): Cell(arm, rate) for rate in ("overload", *RATES) for arm in ARMS}
    duration = seconds / len(cells) / args.rounds / 1.2  # a fifth for answers that come later
    settle = duration / 8
    capacity: dict[str, list[float]] = {arm: [] for arm in ARMS}
    start = time.perf_counter()
    asyncio.run(load.ask(servers["off"].port, bodies[0]))
    alone = time.perf_counter() - start
    for turn in range(args.rounds):
        # the arms in another order each round
        order = [*ARMS][turn % len(ARMS) :] + [*ARMS][: turn % len(ARMS)]
        for arm in order:
            rate = OVERLOAD / alone
            cell = cells[arm, "overload"]
            cell.run(servers[arm], rate, duration, 0, bodies, args.seed + turn, is_overload=True)
            capacity[arm].append(cell.throughputs[-1])
        for name, (base, fraction) in RATES.items():
            rate = max(
                0.1, fraction * capacity[base][0]
            )  # of the first round: all rounds offer the same
            for arm in order:
                cells[arm, name].run(
                    servers[arm], rate, duration, settle, bodies, args.seed + turn,
                    is_overload=False,
                )  # fmt: skip
                print(f"  round {turn}, {name}, {arm}: {cells[arm, name].throughputs[-1]:.2f}/s")
    return list(cells.values())


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one round, one minute, T = 2")
    add("--minutes", type=float, help="length of the whole run (default: 10, or 1 if quick)")
    add("--rounds", type=int, help="number of rounds (default: 2, or 1 if quick)")
    add("--steps", type=int, help="denoising steps T (default: 25, or 2 if quick)")
    add("--model", default="msdda-fast/emoji", help="hub id, local folder, or the shipped model")
    add("--max-batch", type=int, default=8, help="maximum images per batch, at least 2")
    add("--queue-limit", type=int, default=32, help="maximum images in the queue")
    add("--weights", type=int, default=11, help="number of preference vectors to choose from")
    add("--threads", type=int, default=os.cpu_count(), help="torch threads of each server")
    add("--seed", type=int, default=0, help="seed of arrivals and requests")
    add("--results", type=Path, default=RESULTS, help="folder of serving.jsonl and serving.png")
    args = parser.parse_args(given)
    defaults = {"minutes": (10.0, 1.0), "rounds": (2, 1), "steps": (25, 2)}
    for name, (full, quick) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    for name in ("minutes", "rounds", "steps", "weights", "threads"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} must be positive")
    if args.max_batch < 2 or args.queue_limit < args.max_batch:
        parser.error("--max-batch must be at least 2 and --queue-limit no less")
    return args


def main(given: list[str] | None = None) -> int:
    args = parse(given)
    records = measure(args)
    args.results.mkdir(parents=True, exist_ok=True)
    append(str(args.results.resolve() / "serving"), records)
    print(serving_output.table(records))
    serving_output.draw(records, args.results / "serving.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
