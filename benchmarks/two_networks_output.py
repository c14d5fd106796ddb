# SPDX-License-Identifier: Apache-2.0
"""The tables of two networks that cannot be merged: each alone, fused, and in turns."""

import json
from pathlib import Path


def tables(file: Path) -> str:
    """Return the tables and the note of a result of two_networks.py; empty if there is none."""
    if not file.exists():
        return ""
    found = json.loads(file.read_text())
    return "\n\n".join(
        [scores_table(found["systems"]), gains_table(found["gains"]), note(found["setting"])]
    )


def scores_table(systems: list[dict]) -> str:
    """One row per system: forwards of both networks, and means."""
    head = (
        "| system | w | forwards, first + second | consistency | aesthetic | objects | colours "
        "| background chroma |\n|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    rows = []
    for system in systems:
        mean = {name: interval[0] for name, interval in system["scores"].items()}
        cells = [
            system["system"], str(system["w"] or ""), " + ".join(map(str, system["forwards"])),
            f"{mean['consistency']:.3f}", f"{mean['aesthetic']:.3f}",
            f"{mean['judge_object']:.0%}", f"{mean['judge_color']:.0%}",
            f"{mean['background_chroma']:.1f}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, *rows])


def gains_table(gains: list[dict]) -> str:
    """What fusing adds to r_w, one row per other system and one column per w."""
    weights = list(dict.fromkeys(gain["w"] for gain in gains))
    head = "| what fusing adds to | " + " | ".join(f"r_w at w = {w}" for w in weights) + " |"
    rows = [head, "|---" + "|---:" * len(weights) + "|"]
    for over in dict.fromkeys(gain["over"] for gain in gains):
        cells = [marked(gain["r_w"]) for gain in gains if gain["over"] == over]
        rows.append(f"| {over} | {' | '.join(cells)} |")
    return "\n".join(rows)


def note(setting: dict) -> str:
    """The setting in words."""
    first, second = (f"{count / 1e6:.1f} M" for count in setting["parameters"].values())
    etas = ", ".join(f"{name} {eta:g}" for name, eta in setting["etas"].items())
    minutes = setting["distillation"]["seconds"] / 60
    return (
        f"{setting['prompts']} held-out prompts x {setting['seeds']} seeds, T = {setting['steps']} "
        f"or twice that; etas: {etas}. Networks of {first} and {second} parameters in "
        f"{setting['dtype']}, the second trained for {minutes:.0f} minutes. {setting['machine']}, "
        f"torch {setting['torch']}. In brackets 95% intervals of paired differences, by a "
        "bootstrap over prompts, then seeds; * marks those that exclude 0."
    )


def marked(interval: list[float]) -> str:
    """Return a paired difference with its interval, marked if that excludes 0."""
    mean, low, high = interval
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" + (" *" if low * high > 0 else "")
