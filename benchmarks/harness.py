# SPDX-License-Identifier: Apache-2.0
"""Time contenders in turn, in one process, and append the results to a JSON lines file.

Interleaved rounds (A B C A B C ...) expose all contenders to the same machine, busy or not: compare
ratios within a run, never times across runs.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

RESULTS = Path(__file__).parent / "results"


#: After a run the threads of torch, OpenVINO and ONNX Runtime spin for milliseconds, on the cores
#: that the next contender needs.
_REST_S = 0.01


def interleaved(
    contenders: dict[str, Callable[[], object]], seconds: float, device: str = "cpu"
) -> dict[str, dict]:
    """Return median, 20th and 80th percentile of each contender in microseconds, in shared rounds.

    `seconds` is the total time to spend, in at least 7 rounds and at most 400. On "cuda" each run
    starts with a cold L2 cache and is timed between two events.
    """
    measure = _on_gpu if device == "cuda" else _on_host
    start = time.perf_counter()
    for run in contenders.values():
        measure(run)
    rounds = round(seconds / (time.perf_counter() - start))
    seen = in_turn(contenders, min(max(rounds, 7), 400), device)
    return {name: summary(times) for name, times in seen.items()}


def in_turn(
    contenders: dict[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return the microseconds of each contender in every round, as `interleaved` takes them.

    The order is another one in each round: what one contender leaves behind in caches and threads
    should not always meet the same other one.
    """
    measure = _on_gpu if device == "cuda" else _on_host
    for run in contenders.values():  # the first round also warmed caches; this one the threads
        run()
    seen: dict[str, list[float]] = {name: [] for name in contenders}
    names, shuffled = list(contenders), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(names)
        for name in names:
            seen[name].append(measure(contenders[name]))
    return seen


def _on_host(run: Callable[[], object]) -> float:
    time.sleep(_REST_S)
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def _on_gpu(run: Callable[[], object]) -> float:
    _flush().zero_()  # also keeps the GPU busy while the host launches what follows
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) * 1e3


@cache
def _flush() -> torch.Tensor:
    """Return a buffer larger than any L2 cache (H100: 50 MB)."""
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def summary(times: list[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile of microseconds, and how many there are."""
    fifths = statistics.quantiles(times, n=5)
    summary = {"median_us": statistics.median(times), "p20_us": fifths[0], "p80_us": fifths[3]}
    return {key: round(value, 2) for key, value in summary.items()} | {"rounds": len(times)}


def captured(run: Callable[[], torch.Tensor], device: str) -> Callable[[], torch.Tensor]:
    """Return `run` itself on the CPU; on a GPU a CUDA graph, whose replays overwrite one output."""
    if device == "cpu":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def launches(run: Callable[[], object]) -> int:
    """Count the kernels that a call starts on the GPU."""
    run()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    kernels = (event for event in profile.events() if event.device_type.name == "CUDA")
    return sum(1 for _ in kernels)


class Operators(TorchDispatchMode):
    """Counts the operators of a call; those that only make a view are counted separately."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = func.is_view or func is torch.ops.aten._unsafe_view.default
        self.seen["views" if view else "operators"] += 1
        return func(*args, **(kwargs or {}))


def operators(run: Callable[[], object]) -> dict[str, int]:
    with Operators() as mode:
        run()
    return {"operators": mode.seen["operators"], "views": mode.seen["views"]}


def surroundings(device: str = "cpu") -> dict[str, object]:
    """Return machine, versions and commit, without which a number means nothing."""
    gpu = {"gpu": torch.cuda.get_device_name(), "driver": _driver()} if device == "cuda" else {}
    return gpu | {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.split()[0]


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "csrc", "msdda_fast/kernels")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append(bench: str, records: list[dict[str, object]]) -> None:
    """Append `records` to results/<bench>.jsonl in one write: no kill leaves half a line."""
    RESULTS.mkdir(exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    descriptor = os.open(RESULTS / f"{bench}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
