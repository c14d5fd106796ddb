# SPDX-License-Identifier: Apache-2.0
"""The records of one run of serving.py as a table for docs/results.md and as a picture."""

import json
from pathlib import Path

ARMS = {
    "off": "one image per batch",
    "one weight": "one weight vector per batch",
    "mixed": "mixed weights",
}


def last_run(file: Path) -> list[dict]:
    """Return the records of the last full run, or of the last quick one if there is no full run."""
    lines = file.read_text().splitlines() if file.exists() else ()
    records = [json.loads(line) for line in lines]
    full = [record for record in records if not record["is_quick"]] or records
    return [record for record in full if record["when"] == full[-1]["when"]]


def table(records: list[dict]) -> str:
    """Return one row per server: its throughput, and its latencies at the common rates."""
    if not records:
        return ""
    first = records[0]
    cells = {(r["arm"], r["rate"]): r for r in records if r["kind"] == "load"}
    rates = [rate for arm, rate in cells if arm == "off" and rate != "overload"]
    base = cells["off", "overload"]["throughput_per_s"]
    rows = []
    for arm, title in ARMS.items():
        most = cells[arm, "overload"]
        rows.append([
            title, f"{most['throughput_per_s']:.2f}", f"{most['throughput_per_s'] / base:.2f}x",
            f"{most['occupancy']:.1f}", *(latencies(cells[arm, rate]) for rate in rates),
        ])  # fmt: skip
    offered = {rate: cells["off", rate]["offered_per_s"] for rate in rates}
    columns = ["batches", "images/s", "/ batching off", "images per batch"]
    columns += [f"p50 / p95 / p99 at {offered[rate]:.2f}/s ({rate})" for rate in rates]
    head = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)
    alone = {r["batch"]: r["image_ms"] for r in records if r["kind"] == "batch"}
    rounds = cells["off", "overload"]["rounds"]  # the curve of batches has its own
    counts = sorted({cells[arm, rate]["offered"] for arm in ARMS for rate in rates})
    note = (
        f"Real HTTP, Poisson arrivals, latencies in seconds from when a request was due, over "
        f"{counts[0]} to {counts[-1]} requests in {rounds} rounds; images/s under four "
        f"times what batching off can do. {first['model']}, T = {first['steps']}, preferences "
        f"out of {first['weights']}, up to {first['max_batch']} images per batch, "
        f"a queue of {first['queue_limit']}; {first['machine']}, {first['cores']} cores shared by "
        f"server, {first['threads']} threads of torch, and client, "
        f"{max(r['client_cores'] for r in cells.values()):.2f} cores; torch {first['torch']}, "
        f"commit {first['commit']}, {first['when'][:10]}. Without a server an image takes "
        + ", ".join(f"{ms:.0f} ms in a batch of {batch}" for batch, ms in alone.items())
        + "."
    )
    if first["noisy"]:
        worst = max(record["foreign_cores"] for record in cells.values())
        note += f" Noisy: other processes took up to {worst:.1f} cores."
    if first["is_quick"]:
        note += " A quick run: it shows that the benchmark works."
    return "\n".join([head, *("| " + " | ".join(row) + " |" for row in rows), "", note])


def latencies(cell: dict) -> str:
    """Return p50 / p95 / p99, and the shares of requests that were refused or lost."""
    if not cell["completed"]:
        return "none drawn"
    text = " / ".join(f"{cell[f'p{percent}_s']:.1f}" for percent in (50, 95, 99))
    for outcome in ("refused", "lost"):
        if cell[outcome]:
            text += f", {cell[outcome] / cell['offered']:.0%} {outcome}"
    return text


def draw(records: list[dict], path: Path) -> None:
    """Plot throughput and latency against the offered rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [record for record in records if record["kind"] == "load"]
    first = cells[0]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    colours = dict(zip(ARMS, ("C7", "C1", "C0"), strict=True))
    for arm, title in ARMS.items():
        points = sorted((r for r in cells if r["arm"] == arm), key=lambda r: r["offered_per_s"])
        x = [r["offered_per_s"] for r in points]
        y = [r["throughput_per_s"] for r in points]
        left.plot(x, y, "o-", color=colours[arm], label=title)
        calm = [r for r in points if r["rate"] != "overload" and r["completed"]]
        for percent, style in ((50, "o-"), (95, "s--"), (99, "^:")):
            right.plot(
                [r["offered_per_s"] for r in calm], [r[f"p{percent}_s"] for r in calm], style,
                color=colours[arm], label=f"{title}, p{percent}",
            )  # fmt: skip
    most = max(r["throughput_per_s"] for r in cells)
    left.plot([0, 1.3 * most], [0, 1.3 * most], "k:", lw=1, label="all that was offered")
    left.set(xlabel="requests offered per second", ylabel="images per second", ylim=(0, None))
    right.set(xlabel="requests offered per second", ylabel="seconds", yscale="log")
    for ticks in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        ticks("{x:g}")
    left.legend(frameon=False)
    right.legend(frameon=False, fontsize=7)
    noisy = ", noisy" if first["noisy"] else ""
    figure.suptitle(
        f"{first['model']}, T = {first['steps']}, {first['machine']}, {first['cores']} cores{noisy}"
    )
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
