# SPDX-License-Identifier: Apache-2.0
"""The table of few_steps.py: one row per sampler and preference."""

import json
from pathlib import Path

COLUMNS = {
    "consistency": ("consistency reward", 1, "{:+.3f}"),
    "aesthetic": ("aesthetic reward", 1, "{:+.3f}"),
    "judge object": ("objects found", 100, "{:.0f}%"),
    "judge color": ("colours right", 100, "{:.0f}%"),
    "detail": ("detail", 1000, "{:.1f}"),
    "background_chroma": ("background chroma", 1, "{:.1f}"),
}


def last_run(file: Path) -> list[dict]:
    """Return the records of the latest run."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [record for record in records if record["when"] == records[-1]["when"]]


def title(record: dict) -> str:
    """Name a sampler."""
    own = ", accelerator" if record["accelerated"] else ""
    guided = "" if (scale := record["guidance_scale"]) == 1 else f", guidance {scale:g}"
    return f"{record['steps']} steps, {record['scheduler']}{own}{guided}"


def table(file: Path) -> str:
    """Return the table as Markdown; empty without results."""
    if not file.exists():
        return ""
    run = last_run(file)
    first = run[0]
    plain = (record for record in run if title(record) == title(first))
    slowest = {record["weight"]: record["seconds"] for record in plain}
    rows = []
    for record in run:
        weight = record["weight"]
        cells = [title(record), "the base" if weight is None else f"w = {weight:g}"]
        for name, (_, scale, form) in COLUMNS.items():
            mean, low, high = (form.format(scale * value) for value in record["scores"][name])
            cells.append(f"{mean} ({low}, {high})" if "reward" in COLUMNS[name][0] else mean)
        cells.append(f"{1000 * record['seconds']:.0f} ms")
        cells.append(f"{slowest[weight] / record['seconds']:.1f}x")
        rows.append("| " + " | ".join(cells) + " |")
    columns = ["sampler", "preference", *(name for name, _, _ in COLUMNS.values())]
    columns += ["an image", "faster"]
    head = "| " + " | ".join(columns) + " |\n|---|---|" + "---:|" * (len(columns) - 2)
    note = (
        f"{first['model']}, M = 2, w is the weight of consistency; {first['images']} images of "
        f"{first['prompts']} held-out prompts each, in brackets 95% bootstrap intervals over "
        f"images. Detail is 1000 times the mean difference of neighbouring pixels. Times are "
        f"medians of calls for {first['prompts']} images, decoded, in turns: {first['machine']}, "
        f"{first['threads']} thread, load {first['load']}; torch {first['torch']}, "
        f"{first['dtype']}, commit {first['commit']}, {first['when'][:10]}."
    )
    return "\n".join([head, *rows, "", note])
