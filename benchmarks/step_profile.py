# SPDX-License-Identifier: Apache-2.0
"""Profile one step: kernels by total time, and by what they do.

    python benchmarks/step_profile.py --device cuda --model sd15 --objectives 2 --results out

On a GPU the captured step is profiled, on the CPU the eager one, with operators in place of
kernels. Prints a table and appends to step_profile.jsonl in `--results`.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import engine
from benchmarks.contenders.catalogue import AUTO, DESIGNS, options_of
from benchmarks.contenders.configs import CONFIGS
from benchmarks.contenders.contender import verify
from benchmarks.contenders.models import load
from benchmarks.contenders.request import Request
from benchmarks.harness import RESULTS, append, surroundings

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
STEPS = 5
#: The first pattern that a kernel's name matches says what it does.
KINDS = {
    # our own kernels, by the names that Triton and nvcc give them
    "fused step": (
        r"fused_step|msdda|philox|linear_(step|kernel)|moments_(step|kernel)|noise_(fill|kernel)"
    ),
    "grouped LoRA": r"grouped_lora",
    "attention": r"attention|flash|fmha|softmax",
    "convolution": r"conv|wgrad|dgrad|fprop|implicit|winograd|nchw|nhwc",
    "matrix product": r"gemm|nvjet|addmm|aten::mm|bmm|matmul|linear|cutlass|splitk|xmma",
    "norm": r"norm|moments|welford",
    "copy and concatenation": r"copy|cat|memcpy|memset|transpose|fill",
    "pointwise": r"elementwise|silu|gelu|add|mul|div|index|summed|gated",
}


def kind(name: str) -> str:
    """Return what a kernel does, judging by its name."""
    return next((k for k, words in KINDS.items() if re.search(words, name, re.I)), "other")


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    on_gpu = torch.cuda.is_available()
    add("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    add("--model", choices=(*CONFIGS, "emoji"), default="sd15")
    add("--objectives", type=int, default=2, help="number of objectives M")
    add("--dtype", choices=DTYPES, default="fp16" if on_gpu else "fp32")
    add("--design", choices=(AUTO, *DESIGNS), default=AUTO)
    add("--results", type=Path, default=RESULTS, help="folder of step_profile.jsonl")
    args = parser.parse_args(given)
    torch.manual_seed(0)
    model = load(
        args.model, num_objectives=args.objectives, rank=4, device=torch.device(args.device),
        dtype=DTYPES[args.dtype],
    )  # fmt: skip
    request = Request(model, batch=1, num_steps=50)
    step = engine.batched(request, args.objectives, options_of(args.design))
    verify({f"M{args.objectives}": step}, request)
    for _ in range(STEPS):
        step.step()
    gpu = args.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(STEPS):
            step.step()
        if gpu:
            torch.cuda.synchronize()
    shared = surroundings(args.device) | {
        "device": args.device, "model": args.model, "dtype": args.dtype, "design": args.design,
        "num_objectives": args.objectives,
    }  # fmt: skip
    records = []
    for event in seen.key_averages():
        time = event.self_device_time_total if gpu else event.self_cpu_time_total
        if time > 0:
            records.append(
                {
                    "kernel": event.key[:200],
                    "kind": kind(event.key),
                    "calls": event.count / STEPS,
                    "us": round(time / STEPS, 2),
                }
            )
    records.sort(key=lambda record: -record["us"])
    show(records)
    args.results.mkdir(parents=True, exist_ok=True)
    append(str(args.results.resolve() / "step_profile"), [shared | record for record in records])
    return 0


def show(records: list[dict]) -> None:
    """Print the totals of each kind, then the longest kernels."""
    total = sum(record["us"] for record in records)
    kinds: dict[str, list[dict]] = {}
    for record in records:
        kinds.setdefault(record["kind"], []).append(record)
    rows = [
        (name, sum(record["calls"] for record in own), sum(record["us"] for record in own))
        for name, own in kinds.items()
    ]
    rows.sort(key=lambda row: -row[2])
    console = Console(width=140)
    for title, lines in {
        "by kind": rows,
        "by kernel": [(r["kernel"][:90], r["calls"], r["us"]) for r in records[:30]],
    }.items():
        table = Table(title, "per step", "us per step", "share")
        for name, calls, us in lines:
            table.add_row(name, f"{calls:g}", f"{us:.1f}", f"{us / total:.1%}")
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
