# SPDX-License-Identifier: Apache-2.0
"""Tables of the time of a step, of an image, and of what comes before its first step."""

import json

from benchmarks.tables import results
from benchmarks.tables.results import duration, threads
from msdda_fast.kernels.grouped_lora import DEFAULT_DESIGN


def headline_table() -> str:
    """A step of the paper's loop and of ours, one row per number of objectives and device."""
    rows, notes = [], []
    for (device, *_), run in latency_runs().items():
        by_name = {record["contender"]: record for record in run}
        for count in (2, 3, 4):
            # as pipelines run it; on the CPU "auto" is the default design, and was not yet a choice
            usual = run[0]["design"] in ("auto", DEFAULT_DESIGN)
            own = f"M{count}" if usual else f"M{count}/{DEFAULT_DESIGN}"
            paper, ours = by_name.get(f"E3-M{count}", {}), by_name.get(own, {})
            if "median_us" in paper and "median_us" in ours:
                ratio = paper["median_us"] / ours["median_us"]
                rows.append(
                    f"| {device.upper()} | {count} | {duration(paper['median_us'])} "
                    f"| {duration(ours['median_us'])} | {ratio:.1f}x |"
                )
        first = run[0]
        notes.append(
            f"{first['model']} model, batch {first['batch']}, {first['dtype']}, "
            f"{first.get('gpu', first['machine'])}, {threads(first)}, torch "
            f"{first['torch']}, commit {first['commit']}, {first['when'][:10]}"
        )
    if not any(device == "cuda" for device, *_ in latency_runs()):
        rows.append("| CUDA | | not measured yet | not measured yet | |")
    head = (
        "| device | objectives M | the paper's loop: `set_adapter` and a forward each | msdda_fast "
        "| |\n|---|---|---|---|---|"
    )
    return "\n".join([head, *rows, "", f"One denoising step, median: {'; '.join(notes)}."])


def latency_table() -> str:
    return "\n\n".join(latency_run(run) for run in latency_runs().values())


def latency_runs() -> dict[tuple, list[dict]]:
    """Return (device, model, dtype, batch, rank) -> the records of the last run."""
    runs: dict[tuple, list[dict]] = {}
    file = results.RESULTS / "latency.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        record = json.loads(line)
        key = tuple(record[name] for name in ("device", "model", "dtype", "batch", "rank"))
        if key in runs and runs[key][0]["when"] != record["when"]:
            del runs[key]
        runs.setdefault(key, []).append(record)
    return runs


def ratios(record: dict, run: list[dict]) -> dict[str, float | None]:
    """Return the time relative to S, to E1, and to E3 with the same number of objectives."""
    time = {other["contender"]: other.get("median_us") for other in run}
    against = {"S": "S", "E1": "E1", "E3": f"E3-M{record['num_objectives']}"}
    return {
        name: record["median_us"] / time[other] if time.get(other) else None
        for name, other in against.items()
    }


def is_noisy(run: list[dict]) -> bool:
    """Return whether the same contender, timed twice in the run, differs by more than 2%."""
    time = {record["contender"]: record.get("median_us") for record in run}
    pair = time.get("S"), time.get("S again")
    return None not in pair and abs(pair[0] / pair[1] - 1) > 0.02


def latency_run(run: list[dict]) -> str:
    """Return the table of contenders whose whole loop was timed, without designs and ablations."""
    first = run[0]
    kind = "kernels" if first["device"] == "cuda" else "operators"
    ends = first["text_ms"] + first["vae_ms"]
    rows, skipped = [], {}
    for record in run:
        if "skipped" in record:
            if record["skipped"] != "not asked for":
                reason = record["skipped"].split(": ", 1)[-1]
                skipped.setdefault(reason, []).append(record["contender"])
        if "loop_ms" not in record:
            continue
        spread = f"{duration(record['p20_us'])} - {duration(record['p80_us'])}"
        loop = record["loop_ms"]
        cells = [
            f"{record['contender']}: {record['title']}", str(record["num_objectives"]),
            f"{duration(record['median_us'])} ({spread})",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios(record, run).values()),
            f"{loop + ends:.0f} ({loop:.0f})",
            str(record.get(kind, "")), f"{record['parameters_mb']:.1f}",
            f"{record['peak_mb']:.1f}" if "peak_mb" in record else "",
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    columns = [
        f"{first['model']}, batch {first['batch']}", "M", "a step (p20 - p80)", "/ S", "/ E1",
        "/ E3", "ms per image (without text and decoding)", f"{kind} per step", "weights, MB",
        "peak of the networks, MB",
    ]  # fmt: skip
    head = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)
    notes = (
        f"Medians of {max(record.get('rounds', 0) for record in run)} interleaved rounds, "
        f"{first['weights']} weights, guidance {first['guidance']}, T = {first['steps']}; "
        f"{first.get('gpu', first['machine'])}, {threads(first)}, load {first['load']}; "
        f"torch {first['torch']}, {first['dtype']}, commit {first['commit']}, {first['when'][:10]}."
    )
    if is_noisy(run):
        notes += " Noisy: S, timed twice, differs by more than 2%."
    if skipped:
        reasons = "; ".join(f"{', '.join(names)} ({why})" for why, names in skipped.items())
        notes += f" Not run: {reasons}."
    return "\n".join([head, *rows, "", notes])


def request_path_table() -> str:
    """One row per commit: how far a request travels before its first step, and what it costs."""
    rows = []
    for label, found in json.loads((results.RESULTS / "request_path.json").read_text()).items():
        spent = found["milliseconds"]
        rows.append(
            f"| {label}, {found['commit']} | {found['files']} | {found['functions']} "
            f"| {found['hops']} | {len(found['way of the weights'])} "
            f"| {found['files of a request to the server']} | {spent['host']:.1f} ms "
            f"| {spent['unchanged networks']:.1f} ms | {spent['unchanged storage']:.1f} ms |"
        )
    head = (
        "| commit | files | functions | hops | files on the way of the weights "
        "| files of a request to the server | host time | networks unchanged? "
        "| storage unchanged? |\n|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *rows])
