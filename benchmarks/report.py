# SPDX-License-Identifier: Apache-2.0
"""Turn committed results into the tables of docs/results.md, and the small one of the README.

    python benchmarks/report.py

Prints the tables of the latest run of each case, and rewrites the blocks of the two pages between
`<!-- bench:fused_step:begin -->` and `<!-- bench:fused_step:end -->`, and likewise for the other
names of `TABLES`.
"""

import csv
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

from benchmarks import few_steps_output, serving_output, two_networks_output
from msdda_fast.kernels.grouped_lora import DEFAULT_DESIGN
from msdda_fast.pipelines.stable_diffusion.modes import MODES

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{page}.md" for page in ("results", "merge-or-fuse", "guide/few-steps")),
)


def latest(bench: str) -> dict[tuple, dict[str, dict]]:
    """Return ((device, case), M, shape) -> contender -> record, of the last run of each case."""
    runs: dict[tuple, dict[str, dict]] = {}
    for line in (RESULTS / f"{bench}.jsonl").read_text().splitlines():
        record = json.loads(line)
        case = (record.get("device", "cpu"), record["case"])
        key = (case, record["num_objectives"], tuple(record["shape"]))
        if record["when"] != next(iter(runs.get(key, {}).values()), record)["when"]:
            runs[key] = {}
        runs.setdefault(key, {})[record["contender"]] = record
    return runs


def duration(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.0f} µs"
    return f"{microseconds / 1000:.{1 if microseconds < 100_000 else 0}f} ms"


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


def latency_table() -> str:
    return "\n\n".join(latency_run(run) for run in latency_runs().values())


def latency_runs() -> dict[tuple, list[dict]]:
    """Return (device, model, dtype, batch, rank) -> the records of the last run."""
    runs: dict[tuple, list[dict]] = {}
    file = RESULTS / "latency.jsonl"
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
        f"{first.get('gpu', first['machine'])}, {first['threads']} threads, load {first['load']}; "
        f"torch {first['torch']}, {first['dtype']}, commit {first['commit']}, {first['when'][:10]}."
    )
    if is_noisy(run):
        notes += " Noisy: S, timed twice, differs by more than 2%."
    if skipped:
        reasons = "; ".join(f"{', '.join(names)} ({why})" for why, names in skipped.items())
        notes += f" Not run: {reasons}."
    return "\n".join([head, *rows, "", notes])


def modes_table() -> str:
    """One row per mode: divergence and reward of the last quality run, time of the last runs."""
    runs: dict[tuple, list[dict]] = {}
    file = RESULTS / "modes.jsonl"
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
    file = RESULTS / "auto_mode.json"
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


def compare_table() -> str:
    """One row per system: its paired difference to MSDDA at each preference, and its cost."""
    folder = RESULTS / "compare-emoji"
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
    folder = RESULTS / "compare-emoji"
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
    file = RESULTS / comparison / "floors.md"
    return file.read_text().rstrip() if file.exists() else ""


def compare_flow_table() -> str:
    """The same for the flow model, with its setting."""
    table = floors_table("compare-flow")
    if not table:
        return ""
    setting = json.loads((RESULTS / "compare-flow" / "protocol.json").read_text())["setting"]
    return f"{table}\n\n{setting}"


def serving_table() -> str:
    """One row per server: throughput, and latencies at common rates."""
    return serving_output.table(serving_output.last_run(RESULTS / "serving.jsonl"))


def two_networks_table() -> str:
    """Two networks that cannot be merged: alone, fused and in turns, and what fusing adds."""
    return two_networks_output.tables(RESULTS / "two_networks.json")


def few_steps_table() -> str:
    """One row per sampler and preference, with and without an accelerator."""
    return few_steps_output.table(RESULTS / "few_steps.jsonl")


def mode_time(record: dict, exact: dict) -> str:
    """Return the ratio of two medians, marked if their spreads overlap."""
    ratio = f"{record['median_us'] / exact['median_us']:.2f}"
    apart = record["p80_us"] < exact["p20_us"] or exact["p80_us"] < record["p20_us"]
    return ratio if apart or record is exact else f"{ratio} (=)"


def spread(interval: list[float], sign: str = "-") -> str:
    """Return a mean and its interval, to three digits."""
    mean, low, high = (f"{value:{sign}.3g}" for value in interval)
    return f"{mean} ({low}, {high})"


def headline_table() -> str:
    """A step of the paper's loop and of ours, one row per number of objectives and device."""
    rows, notes = [], []
    for (device, *_), run in latency_runs().items():
        by_name = {record["contender"]: record for record in run}
        for count in (2, 3, 4):
            # of the design that pipelines use
            own = (
                f"M{count}" if run[0]["design"] == DEFAULT_DESIGN else f"M{count}/{DEFAULT_DESIGN}"
            )
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
            f"{first.get('gpu', first['machine'])}, {first['threads']} threads, torch "
            f"{first['torch']}, commit {first['commit']}, {first['when'][:10]}"
        )
    if not any(device == "cuda" for device, *_ in latency_runs()):
        rows.append("| CUDA | | not measured yet | not measured yet | |")
    head = (
        "| device | objectives M | the paper's loop: `set_adapter` and a forward each | msdda_fast "
        "| |\n|---|---|---|---|---|"
    )
    return "\n".join([head, *rows, "", f"One denoising step, median: {'; '.join(notes)}."])


def rewrite(name: str, table: str) -> None:
    begin, end = f"<!-- bench:{name}:begin -->", f"<!-- bench:{name}:end -->"
    block = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    for page in PAGES:
        text = page.read_text() if page.exists() else ""
        if block.search(text):
            page.write_text(block.sub(lambda _: f"{begin}\n{table}\n{end}", text))


def request_path_table() -> str:
    """One row per commit: how far a request travels before its first step, and what it costs."""
    rows = []
    for label, found in json.loads((RESULTS / "request_path.json").read_text()).items():
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


TABLES = {
    "headline": headline_table,
    "fused_step": fused_step_table,
    "grouped_lora": grouped_lora_table,
    "latency": latency_table,
    "request_path": request_path_table,
    "modes": modes_table,
    "auto_mode": auto_mode_table,
    "compare": compare_table,
    "gauge": gauge_table,
    "floors": floors_table,
    "compare_flow": compare_flow_table,
    "two_networks": two_networks_table,
    "serving": serving_table,
    "few_steps": few_steps_table,
}

if __name__ == "__main__":
    for bench, make in TABLES.items():
        table = make()
        print(table, end="\n\n")
        rewrite(bench, table)
