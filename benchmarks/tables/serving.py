# SPDX-License-Identifier: Apache-2.0
"""The table of servers, and the line on those before other families were served."""

import json

from benchmarks import serving_output
from benchmarks.tables import results


def serving_table() -> str:
    """One row per server: throughput, and latencies at common rates."""
    return serving_output.table(serving_output.last_run(results.RESULTS / "serving.jsonl"))


def before_table() -> str:
    """One sentence: images per second of the last run of serving_before.py, and their ratio."""
    file = results.RESULTS / "serving_before.jsonl"
    if not file.exists():
        return ""
    last = json.loads(file.read_text().splitlines()[-1])
    per_s, processor = last["per_s"], last["processor_s"]
    noisy = (
        f"; noisy: other processes took up to {last['foreign_cores']:.1f} cores"
        if last["noisy"]
        else ""
    )
    return (
        f"In turns, {last['burst']} requests at once: {per_s['before']:.2f} images/s and "
        f"{processor['before']:.2f} processor seconds per image at commit {last['before']}, "
        f"{per_s['now']:.2f} and {processor['now']:.2f} now. Images per processor second are "
        f"{last['ratio']:.2f}x, the median of {last['rounds']} rounds from "
        f"{min(last['ratios']):.2f}x to {max(last['ratios']):.2f}x ({last['model']}, T = "
        f"{last['steps']}, {last['machine']}, {last['cores']} cores, {last['threads']} threads of "
        f"torch, torch {last['torch']}, commit {last['commit']}, {last['when'][:10]}{noisy}). The "
        f"images of both are {last['levels_apart']} levels of 255 apart."
    )
