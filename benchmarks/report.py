# SPDX-License-Identifier: Apache-2.0
"""Turn committed results into the tables of the README.

    python benchmarks/report.py

Prints the tables of the latest run of each case, and rewrites the README blocks between
`<!-- bench:fused_step:begin -->` and `<!-- bench:fused_step:end -->` (and likewise `grouped_lora`)
where there are any.
"""

import json
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def latest(bench: str) -> dict[tuple, dict[str, dict]]:
    """(case, M, shape) -> contender -> record; of several runs, the last one in the file."""
    runs: dict[tuple, dict[str, dict]] = {}
    for line in (RESULTS / f"{bench}.jsonl").read_text().splitlines():
        record = json.loads(line)
        key = (record["case"], record["num_objectives"], tuple(record["shape"]))
        if record["when"] != next(iter(runs.get(key, {}).values()), record)["when"]:
            runs[key] = {}
        runs.setdefault(key, {})[record["contender"]] = record
    return runs


def duration(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.0f} µs"
    return f"{microseconds / 1000:.{1 if microseconds < 100_000 else 0}f} ms"


def fused_step_table() -> str:
    rows = []
    for (_, count, _), run in latest("fused_step").items():
        time = {name: record["median_us"] for name, record in run.items()}
        drawn = time["diffusers, noise drawn"] / time["native, noise drawn"]
        native = run["native"]
        copy = f"{time['native'] / time['copy']:.2f}" if "copy" in time else ""
        size = "x".join(map(str, native["shape"]))
        spread = f"{duration(native['p20_us'])} - {duration(native['p80_us'])}"
        rows.append(
            f"| {native['case']}, {size} | {count} | {duration(time['diffusers'])} "
            f"| {duration(time['eager'])} | {duration(time['native'])} ({spread}) "
            f"| {time['diffusers'] / time['native']:.1f}x | {drawn:.1f}x "
            f"| {copy} |"
        )
    about = native
    where = (
        f"{about['machine']}, {about['threads']} threads, load {about['load']}; "
        f"torch {about['torch']}, {about['dtype']}, commit {about['commit']}, {about['when'][:10]}"
    )
    head = (
        "| latents | M | diffusers `step` x M + Eq. 7 | eager | native (p20 - p80) "
        "| speed-up | speed-up, noise drawn | native / copy of the same bytes |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *rows, "", f"Medians of interleaved rounds; {where}."])


def grouped_lora_table() -> str:
    designs = ("separate", "folded", "merged", "fused", "peft, one at a time", "peft, mixed batch")
    rows = []
    for (case, count, (tokens, c, n)), run in latest("grouped_lora").items():
        base = run["base"]
        spread = f"{duration(base['p20_us'])} - {duration(base['p80_us'])}"
        cells = []
        for design in designs:
            time = run[design]["median_us"] / base["median_us"] if design in run else None
            operators = run.get(design, {}).get("operators")
            cells.append((f"{time:.3f}" if time else "") + (f" ({operators})" if operators else ""))
        rows.append(
            f"| {case}, {2 * tokens} x {c} -> {n} | {count} "
            f"| {duration(base['median_us'])} ({spread}) | " + " | ".join(cells) + " |"
        )
    where = (
        f"{base.get('gpu', base['machine'])}, load {base['load']}; torch {base['torch']}, "
        f"{base['dtype']}, rank {base['rank']}, commit {base['commit']}, {base['when'][:10]}"
    )
    head = (
        "| layer, rows per objective | M | without adapters (p20 - p80) | "
        + " | ".join(designs)
        + " |\n|"
        + "---|" * (3 + len(designs))
    )
    note = "Medians of interleaved rounds, relative to the layer without adapters, with the number"
    return "\n".join([head, *rows, "", f"{note} of operators per call; {where}."])


def rewrite(name: str, table: str) -> None:
    begin, end = f"<!-- bench:{name}:begin -->", f"<!-- bench:{name}:end -->"
    text = README.read_text() if README.exists() else ""
    block = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if block.search(text):
        README.write_text(block.sub(lambda _: f"{begin}\n{table}\n{end}", text))


TABLES = {"fused_step": fused_step_table, "grouped_lora": grouped_lora_table}

if __name__ == "__main__":
    for bench, make in TABLES.items():
        table = make()
        print(table, end="\n\n")
        rewrite(bench, table)
