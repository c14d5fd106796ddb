# SPDX-License-Identifier: Apache-2.0
"""Tables of the denoisers of other families: M adapters in one forward, and other ways."""

import json

from benchmarks.tables import results
from benchmarks.tables.results import duration


def latency_families_table() -> str:
    return "\n\n".join(_run(run) for run in _runs().values())


def _runs() -> dict[tuple, list[dict]]:
    """Return (device, model, size, dtype, M, rank) -> the records of the last run."""
    runs: dict[tuple, list[dict]] = {}
    file = results.RESULTS / "latency-families.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        record = json.loads(line)
        names = ("device", "model", "size", "dtype", "num_objectives", "rank")
        key = tuple(record[name] for name in names)
        if key in runs and runs[key][0]["when"] != record["when"]:
            del runs[key]
        runs.setdefault(key, []).append(record)
    return runs


def _run(run: list[dict]) -> str:
    first, rows, skipped = run[0], [], []
    for record in run:
        if "skipped" in record:
            skipped.append(f"{record['title']} ({record['skipped']})")
            continue
        spread = f"{duration(record['p20_us'])} - {duration(record['p80_us'])}"
        cells = [
            record["title"], f"{duration(record['median_us'])} ({spread})",
            *(f"{record[key]:.3f}" if key in record else "" for key in ("ratio", "cpu_ratio")),
            str(record.get("operators", "")), f"{record['error']:.0e}",
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    columns = [
        f"{first['model']}, {first['parameters'] / 1e6:.0f} million parameters, "
        f"M = {first['num_objectives']}, rank {first['rank']}",
        "a forward (p20 - p80)", "/ the rows of M", "processor time / the rows of M", "operators",
        "error",
    ]  # fmt: skip
    head = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)
    notes = (
        f"{first['rounds']} interleaved rounds; times are medians, ratios medians of those of each "
        f"round, errors relative to a wider dtype. A hidden objective axis added "
        f"{first['hidden_axis_us'] / 1e3:.2f} ms to a step of a loop with guidance. "
        f"{first.get('gpu', first['machine'])}, {first['threads']} threads, load {first['load']}; "
        f"torch {first['torch']}, {first['dtype']}, commit {first['commit']}, {first['when'][:10]}."
    )
    if skipped:
        notes += f" Not run: {'; '.join(skipped)}."
    return "\n".join([head, *rows, "", notes])
