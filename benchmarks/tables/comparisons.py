# SPDX-License-Identifier: Apache-2.0
"""Tables of the systems of the paper, and of what merging keeps."""

import csv
import json

from benchmarks import two_networks_output
from benchmarks.tables import results


def compare_table(comparison: str = "compare-emoji") -> str:
    """One row per system: its paired difference to MSDDA at each preference, and its cost."""
    folder = results.RESULTS / comparison
    if not (folder / "table.csv").exists():
        return ""
    with (folder / "table.csv").open(newline="") as lines:
        records = list(csv.DictReader(lines))
    preferences = list(dict.fromkeys(record["weights"] for record in records))
    systems: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for record in records:
        system = (record["method"], record["variant"])
        systems.setdefault(system, {})[record["weights"]] = record
    judges = [name for name in records[0] if name in ("judge_object", "judge_color")]
    middle = preferences[len(preferences) // 2]
    rows = []
    for (method, variant), found in systems.items():
        any_of = next(iter(found.values()))
        images = sorted({int(record["images"]) for record in found.values()})
        cells = [f"{method} ({variant})" if variant else method]
        for weights in preferences:
            record = found.get(weights, {})
            if not record:
                cells.append("")
            elif (method, variant) == ("MSDDA", ""):
                cells.append(f"**{float(record['scalarised']):.3f}**")
            else:
                gain = [record[f"msdda_minus_system{end}"] for end in ("", "_low", "_high")]
                mean, low, high = (-float(value) for value in gain)
                mark = " *" if low * high > 0 else ""
                cells.append(f"{mean:+.3f} ({min(low, high):+.3f}, {max(low, high):+.3f}){mark}")
        counts = " to ".join(dict.fromkeys(str(n) for n in (images[0], images[-1])))
        at_middle = found.get(middle, any_of)
        cells += [f"{100 * float(at_middle[name]):.0f}%" for name in judges]
        cells += [any_of[name] for name in ("unet_forwards", "unet_backwards", "reward_calls")]
        rows.append("| " + " | ".join([*cells, counts]) + " |")
    columns = ["system", *(f"r_w at {w.split()[0].replace('=', ' ')}" for w in preferences)]
    columns += [f"{name.removeprefix('judge_')}s right" for name in judges]
    columns += ["UNet forwards", "backwards", "rewards", "images"]
    head = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)
    protocol = json.loads((folder / "protocol.json").read_text())
    note = (
        f"{protocol['setting']} Mean r_w of MSDDA, and what every other system adds to it on the "
        "same prompts and seeds, with 95% bootstrap intervals; * marks those that exclude 0. Costs "
        "are per image."
    )
    if judges:
        note += " What is right says a judge that nothing was optimised against, at the middle w."
    return "\n".join([head, *rows, "", note])


def gauge_table() -> str:
    """The share of MSDDA's gain over the base that each merge keeps, with its figure."""
    folder = results.RESULTS / "compare-emoji"
    if not (folder / "gauge.json").exists():
        return ""
    rows = []
    for at, shares in json.loads((folder / "gauge.json").read_text()).items():
        for share in shares:
            each = share["rotations"]
            spread = f"{min(each):.2f} to {max(each):.2f}" if each else ""
            method, variant = share["system"]
            mean, low, high, pairs = share["share"]
            rows.append(
                f"| {at} | {method} ({variant}) | {mean:.2f} ({low:.2f}, {high:.2f}) | {spread} "
                f"| {pairs} |"
            )
    head = "| preference | merge | share of MSDDA's gain over SD | by rotation | images |\n"
    file = "../benchmarks/results/compare-emoji/gauge.png"
    figure = f"![Share of MSDDA's gain that each merge keeps]({file})"
    setting = json.loads((folder / "protocol.json").read_text())["setting"]
    return "\n".join([figure, "", head + "|---|---|---:|---|---:|", *rows, "", setting])


def floors_table(comparison: str = "compare-emoji") -> str:
    """Gains over the base under the floors, systems without and with rewards apart."""
    file = results.RESULTS / comparison / "floors.md"
    return file.read_text().rstrip() if file.exists() else ""


def compare_flow_table() -> str:
    """The same for the flow model, with its setting."""
    table = floors_table("compare-flow")
    if not table:
        return ""
    setting = json.loads((results.RESULTS / "compare-flow" / "protocol.json").read_text())[
        "setting"
    ]
    return f"{table}\n\n{setting}"


def compare_emoji_flow_table() -> str:
    """Systems without rewards on the flow model, at three preferences."""
    return compare_table("compare-emoji-flow")


def two_networks_table() -> str:
    """Two networks that cannot be merged: alone, fused and in turns, and what fusing adds."""
    return two_networks_output.tables(results.RESULTS / "two_networks.json")
