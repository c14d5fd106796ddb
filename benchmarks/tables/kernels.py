# SPDX-License-Identifier: Apache-2.0
"""Tables of the kernels by themselves."""

import json

from benchmarks.tables import results
from benchmarks.tables.results import duration


def latest(bench: str) -> dict[tuple, dict[str, dict]]:
    """Return ((device, case), M, shape) -> contender -> record, of the last run of each case."""
    runs: dict[tuple, dict[str, dict]] = {}
    for line in (results.RESULTS / f"{bench}.jsonl").read_text().splitlines():
        record = json.loads(line)
        case = (record.get("device", "cpu"), record["case"])
        key = (case, record["num_objectives"], tuple(record["shape"]))
        if record["when"] != next(iter(runs.get(key, {}).values()), record)["when"]:
            runs[key] = {}
        runs.setdefault(key, {})[record["contender"]] = record
    return runs


def fused_step_table() -> str:
    return "\n\n".join(
        fused_step_on(device, backends)
        for device, backends in (("cpu", ["native"]), ("cuda", ["triton", "native"]))
        if any(run["eager"].get("device", "cpu") == device for run in latest("fused_step").values())
    )


def fused_step_on(device: str, backends: list[str]) -> str:
    rows = []
    for (_, count, _), run in latest("fused_step").items():
        eager = run["eager"]
        if eager.get("device", "cpu") != device:
            continue
        time = {name: record["median_us"] for name, record in run.items()}
        size = "x".join(map(str, eager["shape"]))
        compiled = time.get("diffusers, compiled")
        cells = [
            f"{eager['case']}, {size}", str(count), duration(time["diffusers"]),
            duration(compiled) if compiled else "", duration(time["eager"]),
        ]  # fmt: skip
        for name in backends:
            spread = f"{duration(run[name]['p20_us'])} - {duration(run[name]['p80_us'])}"
            drawn = time["diffusers, noise drawn"] / time[f"{name}, noise drawn"]
            cells += [
                f"{duration(time[name])} ({spread})",
                f"{time['diffusers'] / time[name]:.1f}x",
                f"{drawn:.1f}x",
                f"{time[name] / time['copy']:.2f}" if "copy" in time else "",
            ]
            if device == "cuda":
                cells.append(duration(time[f"{name}, captured"]))
        rows.append("| " + " | ".join(cells) + " |")
    where = (
        f"{eager.get('gpu', eager['machine'])}, {eager['threads']} threads, load {eager['load']}; "
        f"torch {eager['torch']}, {eager['dtype']}, commit {eager['commit']}, {eager['when'][:10]}"
    )
    columns = ["latents", "M", "diffusers `step` x M + Eq. 7", "the same, compiled", "eager"]
    for name in backends:
        columns += [
            f"{name} (p20 - p80)", "speed-up", "speed-up, noise drawn",
            f"{name} / copy of the same bytes",
        ]  # fmt: skip
        columns += [f"{name}, captured, noise drawn"] if device == "cuda" else []
    head = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)
    return "\n".join([head, *rows, "", f"Medians of interleaved rounds; {where}."])


def grouped_lora_table() -> str:
    designs = ("separate", "folded", "merged", "fused", "peft, one at a time", "peft, mixed batch")
    rows = []
    for ((_, case), count, (tokens, c, n)), run in latest("grouped_lora").items():
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
