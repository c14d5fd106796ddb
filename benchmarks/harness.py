# SPDX-License-Identifier: Apache-2.0
"""Time contenders in turn, in one process, and append what was seen to a JSON lines file.

Interleaved rounds (A B C A B C ...) let all contenders see the same machine, busy or not: compare
ratios within a run, never times across runs.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(contenders: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict]:
    """Median, 20th and 80th percentile in microseconds of each contender over common rounds.

    `seconds` is the time to spend on all of them; there are at least 7 rounds and at most 400.
    """
    start = time.perf_counter()
    for run in contenders.values():
        run()
    rounds = round(seconds / (time.perf_counter() - start))
    for run in contenders.values():  # the first round also warmed caches; this one the threads
        run()
    seen: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(min(max(rounds, 7), 400)):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seen[name].append((time.perf_counter() - start) * 1e6)
    return {name: _summary(times) for name, times in seen.items()}


def _summary(times: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times, n=5)
    summary = {"median_us": statistics.median(times), "p20_us": fifths[0], "p80_us": fifths[3]}
    return {key: round(value, 2) for key, value in summary.items()} | {"rounds": len(times)}


def surroundings() -> dict[str, object]:
    """Machine, versions and commit: what a number means nothing without."""
    return {
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
    """Append `records` to results/<bench>.jsonl in one write: a killed run leaves no half line."""
    RESULTS.mkdir(exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    descriptor = os.open(RESULTS / f"{bench}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
