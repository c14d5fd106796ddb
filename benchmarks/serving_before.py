# SPDX-License-Identifier: Apache-2.0
"""Compare the server of this checkout with that of another one, in turns: images per second.

    git worktree add /tmp/before COMMIT
    python benchmarks/serving_before.py --before /tmp/before

Both get the same requests, `--burst` at once, one server after the other in every round, each first
in half of them; and both must draw the same images. Processor time of the servers is kept beside
the clock's: on a machine that others use, it tells more. Appends to results/serving_before.jsonl;
`benchmarks/report.py` makes the line of docs/results.md.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import numpy as np
from PIL import Image

from benchmarks import load
from benchmarks.contenders.servers import ROOT, Server
from benchmarks.harness import append, surroundings
from benchmarks.serving import NOISY, requests
from benchmarks.serving_cell import busy

SEED = 0
NAMES = ["aesthetic", "consistency"]


def burst(port: int, bodies: list[dict]) -> tuple[float, list[np.ndarray]]:
    """Send requests at once; return the seconds until the last answer, and the images."""

    async def ask() -> list[load.Reply]:
        return await asyncio.gather(*(load.ask(port, body) for body in bodies))

    start = time.perf_counter()
    replies = asyncio.run(ask())
    seconds = time.perf_counter() - start
    if wrong := [reply.status for reply in replies if reply.status != 200]:
        raise RuntimeError(f"a server answered {wrong[0]}")
    texts = [json.loads(reply.content)["data"][0]["b64_json"] for reply in replies]
    images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in texts]
    return seconds, [np.asarray(image, int) for image in images]


def measure(args: argparse.Namespace) -> dict:
    """Run the rounds and return the record."""
    roots = {"before": args.before.resolve(), "now": ROOT}
    clock: dict[str, list[float]] = {arm: [] for arm in roots}
    processor: dict[str, list[float]] = {arm: [] for arm in roots}
    apart, foreign = 0, 0.0
    with ExitStack() as stack:
        servers = {}
        for arm, root in roots.items():
            servers[arm] = stack.enter_context(Server(arm, args, root))
            servers[arm].wait()
            burst(servers[arm].port, requests(args.burst, NAMES, 11, SEED))  # warms caches
        for turn in range(args.rounds):
            bodies = requests(args.burst, NAMES, 11, SEED + turn)
            drawn = {}
            for arm in list(roots) if turn % 2 else list(roots)[::-1]:
                all_before, before = busy([servers[arm].process.pid])
                seconds, drawn[arm] = burst(servers[arm].port, bodies)
                all_after, after = busy([servers[arm].process.pid])
                clock[arm].append(seconds / args.burst)
                processor[arm].append((after - before) / args.burst)
                foreign = max(foreign, (all_after - all_before - after + before) / seconds)
                print(f"  round {turn}, {arm}: {args.burst / seconds:.2f} images/s, ", end="")
                print(f"{processor[arm][-1]:.3f} processor seconds per image")
            pairs = zip(drawn["before"], drawn["now"], strict=True)
            apart = max(apart, *(int(abs(a - b).max()) for a, b in pairs))
    ratios = [a / b for a, b in zip(processor["before"], processor["now"], strict=True)]
    git = ["git", "-C", str(roots["before"]), "rev-parse", "--short", "HEAD"]
    return surroundings() | {
        "before": args.commit or subprocess.check_output(git, text=True).strip(),
        "model": args.model, "steps": args.steps, "max_batch": args.max_batch,
        "rounds": args.rounds, "burst": args.burst, "threads": args.threads,
        "per_s": {arm: round(1 / statistics.median(clock[arm]), 3) for arm in roots},
        "processor_s": {arm: round(statistics.median(processor[arm]), 4) for arm in roots},
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
        "levels_apart": apart,
        "foreign_cores": round(foreign, 3), "noisy": foreign > NOISY,
    }  # fmt: skip


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--before", type=Path, required=True, help="folder of the other checkout")
    add("--commit", help="its commit, if it is no git checkout")
    add("--rounds", type=int, default=6, help="number of rounds, an even one")
    add("--burst", type=int, default=16, help="requests at once; one client may have 16 in line")
    add("--model", default="msdda-fast/emoji", help="hub id, local folder, or the shipped model")
    add("--steps", type=int, default=25, help="denoising steps T")
    add("--max-batch", type=int, default=8, help="maximum images per batch")
    add("--queue-limit", type=int, default=32, help="maximum images in the queue")
    add("--threads", type=int, default=os.cpu_count(), help="torch threads of each server")
    args = parser.parse_args(given)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    record = measure(args)
    append("serving_before", [record])
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
