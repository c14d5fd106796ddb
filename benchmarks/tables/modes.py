# SPDX-License-Identifier: Apache-2.0
"""Tables of the approximate modes: what they cost, and how far they are from exact."""

import json

from benchmarks.tables import results
from benchmarks.tables.results import spread
from msdda_fast.pipelines.stable_diffusion.modes import MODES


def modes_table() -> str:
    """One row per mode: divergence and reward of the last quality run, time of the last runs."""
    runs: dict[tuple, list[dict]] = {}
    file = results.RESULTS / "modes.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        record = json.loads(line)
        if record["mode"] not in (*MODES, "exact, bfloat16"):
            continue  # of a mode that is no more
        key = (record["kind"], record.get("batch"))
        if key in runs and runs[key][0]["when"] != record["when"]:
            del runs[key]
        runs.setdefault(key, []).append(record)
    if not runs:
        return ""
    quality = runs.pop(("quality", None), [])
    timed = {
        batch: {record["mode"]: record for record in run}
        for (_, batch), run in sorted(runs.items())
    }
    yardstick = next(record["kl"][0] for record in quality if record["mode"] == "exact, bfloat16")
    rows = []
    for record in quality:
        kl, change = record["kl"][0], record["changes"]
        cells = [
            record["mode"], spread(record["kl"]) if kl else "0",
            f"{kl / yardstick:.2g}" if kl else "0", f"{record['kl_late']:.0%}" if kl else "",
            spread(record["estimate"]) if "estimate" in record else "",
            *(spread(change[r], "+") if kl else "0" for r in ("consistency", "aesthetic")),
            *(
                mode_time(times[record["mode"]], times["exact"]) if record["mode"] in times else ""
                for times in timed.values()
            ),
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    first = quality[0]
    columns = [
        "mode", "path KL, nats", "/ bfloat16", "of it in the last fifth", "estimated online",
        "consistency reward, change", "aesthetic reward, change",
        *(f"time / exact, batch {batch}" for batch in timed),
    ]  # fmt: skip
    head = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)
    note = (
        f"Shipped model, M = 2, T = {first['steps']}, w = {first['weight']}, {first['images']} "
        f"images of {first['prompts']} held-out prompts; in brackets 95% bootstrap intervals over "
        f"images. {first['machine']}, {first['threads']} thread; torch {first['torch']}, "
        f"{first['dtype']}, commit {first['commit']}, {first['when'][:10]}. Times are medians of "
        f"whole calls in turns, (=) where their 20th to 80th percentiles overlap those of exact: "
    )
    note += "; ".join(
        f"batch {batch}, {run['exact']['rounds']} rounds, load {run['exact']['load']}, commit "
        f"{run['exact']['commit']}"
        for batch, run in timed.items()
    )
    note += "."
    return "\n".join([head, *rows, "", note])


def auto_mode_table() -> str:
    """One row per adapter scale and weight: what receipts said, and what was so."""
    file = results.RESULTS / "auto_mode.json"
    if not file.exists():
        return ""
    result = json.loads(file.read_text())
    setting, rows = result["setting"], []
    for cell in result["cells"]:
        cells = [
            f"{cell['scale']:g}", f"{cell['weight']:g}", f"{cell['budget']:.2f}",
            f"{cell['forwards_per_step']:.2f}", spread(cell["truth"]), f"{cell['estimate']:.3g}",
            f"{cell['upper']:.3g}", f"{cell['held']} of {cell['images']}",
            *(spread(cell["changes"][r], "+") for r in ("consistency", "aesthetic")),
            *(spread(m[n]) if (m := cell["merging"]) else "" for n in ("first_order", "precision")),
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    columns = [
        "adapter scale", "w", "budget, nats", "forwards a step", "path KL, nats", "estimate",
        "limit", "limit held", "consistency reward, change", "aesthetic reward, change",
        "path KL of merging every step", "at shares of Eq. 7",
    ]  # fmt: skip
    head = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)
    note = (
        f"Shipped model, M = 2, T = {setting['steps']}, default budget; the limit held in "
        f"{result['held']} of {result['images']} images, and is stated for "
        f"{setting['limit']:.1%}. A pilot has {setting['pilots']} images and takes "
        f"{result['cells'][0]['pilot_forwards']} forwards, once per scale. In brackets "
        f"{setting['intervals']}. {setting['machine']}, torch {setting['torch']}, "
        f"{setting['dtype']}, commit {setting['commit']}, {setting['when'][:10]}."
    )
    return "\n".join([head, *rows, "", note])


def mode_time(record: dict, exact: dict) -> str:
    """Return the ratio of two medians, marked if their spreads overlap."""
    ratio = f"{record['median_us'] / exact['median_us']:.2f}"
    apart = record["p80_us"] < exact["p20_us"] or exact["p80_us"] < record["p20_us"]
    return ratio if apart or record is exact else f"{ratio} (=)"
