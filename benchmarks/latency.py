# SPDX-License-Identifier: Apache-2.0
"""Time one denoising step, and one image, of every way to sample from M aligned models.

    python benchmarks/latency.py                     # CUDA: sd15 in float16; CPU: the shipped model
    python benchmarks/latency.py --model sdxl --batch 1,4 --objectives 1,2,4 --rank 16
    python benchmarks/latency.py --checkpoint path/to/stable-diffusion-v1-5 --contenders "E*,S*,M*"
    python benchmarks/latency.py --model flux --size cpu        # see latency_families.py

Contenders: E1 to E5 are stock diffusers and peft, eager; C1 to C4 the same compiled; G1 and G4 the
same captured (GC: also compiled); S is our engine with one objective, M2, M3, ... with more; then
the other designs of adapted layers, and ablations (M2-no-...); OV1, ORT1, ... are OpenVINO and ONNX
Runtime (the extra `peers`), on one adapter. All start from the same latents,
prompt and noise. Each is compared with `reference.py` before anything is timed; if one is wrong,
nothing is printed or kept. Then all take turns, step by step, so that ratios also hold on a busy
machine; absolute times need an idle one. Weights are random and not zero, or from a checkpoint.

Appends to latency.jsonl in `--results` and draws latency.png there; `benchmarks/report.py` makes
the table of docs/results.md.
"""

import argparse
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import torch
from rich.console import Console

from benchmarks import latency_families, latency_output
from benchmarks.contenders import families
from benchmarks.contenders.catalogue import AUTO, DESIGNS, Entry, build, catalogue
from benchmarks.contenders.configs import CONFIGS
from benchmarks.contenders.contender import LIMITS, Contender, Unverified, effect, verify
from benchmarks.contenders.models import Model, held_bytes, load
from benchmarks.contenders.request import Request
from benchmarks.harness import RESULTS, append, interleaved, launches, operators, surroundings
from msdda_fast.engine.dry_run import dry_run
from msdda_fast.errors import MSDDAError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def arguments(given: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    models = dict.fromkeys([*CONFIGS, "emoji", *families.FAMILIES])
    add("--model", choices=models, default="sd15" if on_gpu else "emoji")
    add("--size", choices=families.SIZES, help="the denoiser of a family alone, of this size")
    add("--checkpoint", type=Path, help="folder in diffusers' layout, instead of --model")
    add("--objectives", type=numbers, default=[1, 2, 3, 4], help="M, e.g. 1,2,3,4")
    add("--batch", type=numbers, default=[1], help="images per call, e.g. 1,4")
    add("--steps", type=int, default=50, help="denoising steps T")
    add("--rank", type=int, help="rank of the random adapters (default: 4; with --size 32)")
    add("--guidance", type=float, help="guidance scale (default: the model's own, or 7.5)")
    add("--dtype", choices=DTYPES, default="fp16" if on_gpu else "fp32")
    add("--design", choices=(AUTO, *DESIGNS), default=AUTO, help="design of S, M2, M3, ...")
    add("--contenders", default="*", help='names or patterns, e.g. "E1,E3*,S,M2*"')
    add("--rounds", type=int, default=20, help="minimum rounds; each times every contender once")
    add("--loops", type=int, default=3, help="runs of all T steps; their median is reported")
    add("--results", type=Path, default=RESULTS, help="folder of latency.jsonl and latency.png")
    args = parser.parse_args(given)
    if (args.size is None) == (args.model in families.FAMILIES) and args.model != "sdxl":
        parser.error(f"--size is for {', '.join(families.FAMILIES)}, and these need it")
    return args


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    # networks of all contenders share the code of one forward, and dynamo counts per code
    torch._dynamo.config.recompile_limit = 256
    if args.size is not None:
        return latency_families.main(args, DTYPES[args.dtype])
    args.rank = 4 if args.rank is None else args.rank
    torch.manual_seed(0)
    console = Console(width=max(Console().width, 190))
    model = load(
        args.model,
        num_objectives=max(args.objectives),
        rank=args.rank,
        device=torch.device(args.device),
        dtype=DTYPES[args.dtype],
        checkpoint=args.checkpoint,
        guidance=args.guidance,
    )
    entries = catalogue(args.objectives, args.design, args.device)
    for batch in args.batch:
        try:
            records = measure(args, model, entries, batch)
        except Unverified as error:
            print(error, file=sys.stderr)
            return 1
        args.results.mkdir(parents=True, exist_ok=True)
        append(str(args.results.resolve() / "latency"), records)
        latency_output.show(console, records)
        latency_output.draw(records, args.results / "latency.png")
    return 0


def measure(
    args: argparse.Namespace, model: Model, entries: list[Entry], batch: int
) -> list[dict[str, object]]:
    """Return one record per contender; those that were skipped have the reason."""
    request = Request(model, batch=batch, num_steps=args.steps)
    contenders, skipped = build(entries, request, args.contenders.split(","))
    errors = verify(contenders, request)
    effects = {name: effect(contender, request) for name, contender in contenders.items()}
    parts = {"text_ms": lambda: request.encode(), "vae_ms": lambda: request.decode()}
    before = clocks(args.device)
    with torch.no_grad():
        runs = {name: contender.step for name, contender in contenders.items()}
        timings = interleaved(runs, enough(runs, args.rounds), args.device)
        ends = interleaved(parts, 1.0, args.device)
        headline = [entry.name for entry in entries if entry.headline and entry.name in contenders]
        whole = {name: contenders[name].loop for name in headline}
        loops = loop_times(whole, args.loops, args.device)
    # after all times: where kernels were counted once, the profiler of CUDA stays on
    facts = {name: describe(contender, args.device) for name, contender in contenders.items()}
    shared = surroundings(args.device) | {
        "device": args.device,
        "model": args.model if args.checkpoint is None else args.checkpoint.name,
        "weights": model.weights,
        "dtype": args.dtype,
        "batch": batch,
        "shape": list(request.shape),
        "steps": args.steps,
        "rank": args.rank,
        "guidance": model.guidance,
        "branches": request.branches,
        "design": args.design,
        "clocks": [before, clocks(args.device)],
        **{name: round(end["median_us"] / 1e3, 3) for name, end in ends.items()},
    }
    records = []
    for entry in entries:
        record = shared | {
            "contender": entry.name,
            "title": entry.title,
            "num_objectives": entry.count,
        }
        if entry.name in skipped:
            record["skipped"] = skipped[entry.name]
        else:
            record |= timings[entry.name] | facts[entry.name]
            record["error"] = float(f"{errors[entry.name]:.3g}")
            record |= {"effect": effects[entry.name], "limit": LIMITS[request.dtype]}
            record |= {"loop_ms": loops[entry.name]} if entry.name in loops else {}
        records.append(record)
    return records


def describe(contender: Contender, device: str) -> dict[str, object]:
    """Return what does not depend on the clock: launches or operators, and memory in MB.

    Our step counts as one operator in every backend.
    """
    facts: dict[str, object] = {"parameters_mb": round(held_bytes(contender.parameters) / 1e6, 3)}
    with torch.no_grad():
        if device == "cuda":
            facts["kernels"] = launches(contender.step)
        elif not contender.compiled:
            facts |= operators(contender.step)
        forward = contender.forward
        if forward is None:
            return facts
        try:
            facts["peak_mb"] = round(dry_run(lambda _: forward(), None).peak_bytes / 1e6, 3)
        except MSDDAError as error:  # peft's mixed batch reads on the host
            facts["no_peak"] = str(error)[:200]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            forward()
            facts["cuda_peak_mb"] = round((torch.cuda.max_memory_allocated() - held) / 1e6, 3)
    return facts


def enough(runs: dict[str, Callable[[], object]], rounds: int) -> float:
    """Warm up all contenders and return the seconds that `rounds` rounds take."""
    for _ in range(3):
        start = time.perf_counter()
        for run in runs.values():
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return (rounds + 1) * (time.perf_counter() - start)


def loop_times(
    loops: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, float]:
    """Return the median milliseconds of all T steps, measured on the host."""
    seen: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop()
            if device == "cuda":
                torch.cuda.synchronize()
            seen[name].append((time.perf_counter() - start) * 1e3)
    return {name: round(statistics.median(times), 3) for name, times in seen.items()}


def clocks(device: str) -> str | None:
    """Return clock, temperature and power of the GPU, if nvidia-smi reports them."""
    query = "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw"
    if device == "cpu":
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
