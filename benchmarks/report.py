# SPDX-License-Identifier: Apache-2.0
"""Turn committed results into the tables of the README.

    python benchmarks/report.py

Prints the table of the latest run of each case, and rewrites the README block between
`<!-- bench:fused_step:begin -->` and `<!-- bench:fused_step:end -->` if there is one.
"""

import json
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def latest(bench: str) -> dict[tuple[str, int], dict[str, dict]]:
    """(case, M) -> contender -> record; of several runs, the last one in the file."""
    runs: dict[tuple[str, int], dict[str, dict]] = {}
    for line in (RESULTS / f"{bench}.jsonl").read_text().splitlines():
        record = json.loads(line)
        key = (record["case"], record["num_objectives"])
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
    for (_, count), run in latest("fused_step").items():
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


def rewrite(name: str, table: str) -> None:
    begin, end = f"<!-- bench:{name}:begin -->", f"<!-- bench:{name}:end -->"
    text = README.read_text() if README.exists() else ""
    block = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if block.search(text):
        README.write_text(block.sub(lambda _: f"{begin}\n{table}\n{end}", text))


if __name__ == "__main__":
    table = fused_step_table()
    print(table)
    rewrite("fused_step", table)
