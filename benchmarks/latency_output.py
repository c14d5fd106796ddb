# SPDX-License-Identifier: Apache-2.0
"""Show the records of one run of latency.py as a table on the screen and as a figure."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from benchmarks.tables.latency import is_noisy, ratios

#: ms per step of the H100 at its ceilings, per layer max(compute, weights): SD1.5, 512 x 512, one
#: image with guidance, 16 bit, for M = 1 to 4.
H100_ROOFLINE_SD15 = (2.16, 4.09, 6.12, 8.15)


def show(console: Console, records: list[dict]) -> None:
    """Print all contenders with their ratios, then what was skipped and why."""
    first = records[0]
    where = first.get("gpu", first["machine"])
    kind = "kernels" if first["device"] == "cuda" else "operators"
    table = Table(
        title=f"{first['model']}, {first['weights']} weights, {first['dtype']}, batch "
        f"{first['batch']}, T = {first['steps']}, guidance {first['guidance']}, {where}",
        title_justify="left",
    )
    table.add_column("contender", no_wrap=True)
    table.add_column("", no_wrap=True, max_width=34)
    columns = [
        "M", "ms/step", "p20 - p80", "/ S", "/ E1", "/ E3", "ms/image", "loop only", kind,
        "held MB", "peak MB", "error",
    ]  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    timed = [record for record in records if "median_us" in record]
    ends = first["text_ms"] + first["vae_ms"]
    for record in timed:
        loop = record.get("loop_ms")
        table.add_row(
            record["contender"],
            record["title"],
            str(record["num_objectives"]),
            _ms(record["median_us"]),
            f"{_ms(record['p20_us'])} - {_ms(record['p80_us'])}",
            *(_cell(ratio, ".3f") for ratio in ratios(record, records).values()),
            _cell(loop and loop + ends, ".1f"),
            _cell(loop, ".1f"),
            str(record.get(kind, "")),
            f"{record['parameters_mb']:.1f}",
            _cell(record.get("peak_mb"), ".1f"),
            f"{record['error']:.1e}",
        )
    console.print(table)
    console.print(
        f"Medians of {timed[0]['rounds'] if timed else 0} interleaved rounds, load "
        f"{first['load']}; text {first['text_ms']} ms and decoding {first['vae_ms']} ms per call "
        "are in ms/image and not in the loop."
    )
    if is_noisy(records):
        console.print("[bold red]NOISY: S and S again differ by more than 2%; measure again.")
    blind = [r["contender"] for r in timed if r["effect"] is not None and r["effect"] < r["limit"]]
    if blind:
        names = ", ".join(blind)
        console.print(f"[bold red]The adapters change less than the check allows: {names}.")
    for record in records:
        if record.get("skipped", "not asked for") != "not asked for":
            console.print(f"skipped {record['contender']}: {record['skipped']}", markup=False)


def draw(records: list[dict], path: Path) -> None:
    """Plot milliseconds per step against M, with M times one model, and the roofline if known."""
    first = records[0]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    time = {r["contender"]: r for r in records if "median_us" in r}
    most = max((r["num_objectives"] for r in time.values()), default=1)
    for label, one, more in (
        ("the paper's way: set_adapter x M", "E1", "E3-M{}"),
        ("merged copies x M", "E1", "E4-M{}"),
        ("peft adapter_names", "", "E5-M{}"),
        ("ours", "S", "M{}"),
    ):
        names = {m: one if m == 1 else more.format(m) for m in range(1, most + 1)}
        points = {m: time[name] for m, name in names.items() if name in time}
        if points:
            middle = [point["median_us"] / 1e3 for point in points.values()]
            spread = [
                [abs(point[end] - point["median_us"]) / 1e3 for point in points.values()]
                for end in ("p20_us", "p80_us")
            ]
            axes.errorbar(list(points), middle, yerr=spread, marker="o", capsize=3, label=label)
    for name, style, label in (
        ("E1", "k-.", "M x diffusers: the paper's 2.0x at M = 2"),
        ("S", "k--", "M x ours at M = 1"),
    ):
        if name in time:
            line = [m * time[name]["median_us"] / 1e3 for m in range(1, most + 1)]
            axes.plot(range(1, most + 1), line, style, lw=1, label=label)
    on_h100 = "H100" in first.get("gpu", "") and first["dtype"] in ("fp16", "bf16")
    if on_h100 and first["model"] == "sd15" and first["batch"] == 1 and first["branches"] == 2:
        floor = H100_ROOFLINE_SD15[:most]
        axes.plot(range(1, len(floor) + 1), floor, "k:", lw=1, label="roofline of the H100")
    axes.set(
        xlabel="objectives M", ylabel="ms per step", xticks=range(1, most + 1), ylim=(0, None),
        title=f"{first['model']}, batch {first['batch']}, {first['dtype']}, "
        f"{first.get('gpu', first['machine'])}, {first['threads']} threads",
    )  # fmt: skip
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1e3:.2f}"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
