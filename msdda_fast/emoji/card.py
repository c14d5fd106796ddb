# SPDX-License-Identifier: Apache-2.0
"""Write the model card of `msdda-fast/emoji` from its logs and results; no number is typed by hand.

Run `python -m msdda_fast.emoji.card`; the template is `card.md` beside this file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import safe_open

from msdda_fast.assets import ASSETS
from msdda_fast.emoji import distil
from msdda_fast.emoji.align import ALIGNMENT, PROMPTS, RANK, TIMESTEPS
from msdda_fast.emoji.captions import Tail
from msdda_fast.emoji.prompts import TRAIN_PROMPTS
from msdda_fast.emoji.teacher_paths import GUIDANCE_SCALE, SPACING
from msdda_fast.emoji.train import ADAPTER_LOGS, LOGS, STYLES
from msdda_fast.emoji.train_scorer import CONSISTENCY, HELD_OUT_STYLE, JUDGE
from msdda_fast.files import write_atomically
from msdda_fast.pipelines.accelerator import ACCELERATOR_FOLDER, MANIFEST

EMOJI = ASSETS / "emoji"
COLUMNS = {
    "consistency": "consistency reward",
    "aesthetic": "aesthetic reward",
    "warmth": "warmth reward",
    "judge object": "object found",
    "judge color": "colour right",
}
CERTIFIED = ("kl_weight", "r_squared")


def results_table(results: dict[str, Any], *, single: bool = False) -> str:
    """Return the arms as a Markdown table of means with 95% intervals."""
    suffix = ", single-object prompts" if single else ""
    measured = next(iter(results["arms"].values()))
    columns = [name for name in COLUMNS if name in measured]
    head = ["arm", *(COLUMNS[name] for name in columns)]
    rows = []
    for arm, figures in results["arms"].items():
        cells = [arm]
        for name in columns:
            one = figures[name + suffix]
            scale, unit = (100, "%") if name.startswith("judge") else (1, "")
            digits = 1 if unit else 3
            mean, low, high = (f"{scale * one[k]:.{digits}f}" for k in ("mean", "low", "high"))
            cells.append(f"{mean}{unit} ({low}, {high})")
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def certificate_table(certificate: dict[str, Any]) -> str:
    """Return what `msdda-fast certify` found of each objective and its own reward, as Markdown."""
    head = ["adapter", "lambda", "R^2", "KL(base to adapter) over the path, nats"]
    rows = [head, ["---"] * len(head)]
    for name, by_reward in certificate["objectives"].items():
        own = by_reward[name]
        fit = ["{value:.3f} ({low:.3f}, {high:.3f})".format(**own[k]) for k in CERTIFIED]
        rows.append([name, *fit, f"{own['kl']:.1f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the rows of a training log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_training(folder: Path, quantities: Mapping[str, str], target: Path) -> None:
    """Plot one quantity of every training log in `folder`, by the log's name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = -(-len(quantities) // 4)
    size = (13, 2.6 * lines)
    figure, axes = plt.subplots(
        lines, -(-len(quantities) // lines), figsize=size, squeeze=False, layout="constrained"
    )
    for axis, (name, quantity) in zip(axes.flat, quantities.items(), strict=False):
        rows = read_log(folder / f"{name}.jsonl")
        axis.plot([row["step"] for row in rows], [row[quantity] for row in rows], linewidth=1)
        axis.set(title=name, xlabel="step", ylabel=quantity)
        if not name.startswith("align-"):
            axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(quantities) :]:
        axis.set_visible(False)
    figure.savefig(target, dpi=80)
    plt.close(figure)


def parameters(path: Path) -> int:
    """Count the numbers in a safetensors file."""
    count = 0
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            size = 1
            for side in file.get_slice(name).get_shape():
                size *= side
            count += size
    return count


def sizes_table(*folders: Path) -> tuple[str, str]:
    """Return all weights in folders of `ASSETS` as rows of Markdown, and their size in MB."""
    weights = sorted(path for folder in folders for path in folder.rglob("*.safetensors"))
    rows = (
        f"| {path.relative_to(ASSETS)} | {parameters(path):,} "
        f"| {path.stat().st_size / 1e6:.2f} MB |"
        for path in weights
    )
    return "\n".join(rows), f"{sum(path.stat().st_size for path in weights) / 1e6:.2f}"


def accelerator_figures() -> dict[str, Any]:
    """Return what the card says of the accelerator, from its recipe, manifest and log."""
    entry = json.loads((EMOJI / MANIFEST).read_text())["accelerator"]
    seconds = read_log(EMOJI / "training" / f"{ACCELERATOR_FOLDER}.jsonl")[-1]["seconds"]
    return {
        "accelerator_scheduler": entry["scheduler"],
        "accelerator_steps": entry["steps"],
        "accelerator_rank": distil.RANK,
        "accelerator_minutes": f"{seconds / 60:.0f}",
        "accelerator_updates": distil.STEPS,
        "accelerator_batch": distil.BATCH,
        "accelerator_guidance": GUIDANCE_SCALE,
        "paths": distil.FROM_NOISE + distil.FROM_RENDERS,
        "from_noise": distil.FROM_NOISE,
        "solver_steps": math.ceil(1000 / SPACING),
    }


def card(results: dict[str, Any], three: dict[str, Any], certificate: dict[str, Any]) -> str:
    """Return the text of the model card from the results of two objectives, three, and certify."""
    tail, setting = Tail(), results["setting"]
    minutes = {n: read_log(EMOJI / "training" / f"{n}.jsonl")[-1]["seconds"] / 60 for n in LOGS}
    accuracy = json.loads((ASSETS / "scorers" / "accuracy.json").read_text())
    sizes, total = sizes_table(EMOJI, ASSETS / "scorers")
    scorers = "\n".join(
        f"| {name} | {where} | {100 * a['object']:.1f}% | {100 * a['color']:.1f}% | {a['n']} |"
        for name, cases in accuracy.items()
        for where, a in cases.items()
    )
    recipes = "\n".join(
        f"| {name} | {recipe.eta} | {recipe.config.steps} | {recipe.config.lr:g} "
        f"| {recipe.config.kl_weight:g} | {recipe.config.seed} |"
        for name, recipe in ALIGNMENT.items()
    )
    template = (Path(__file__).parent / "card.md").read_text()
    return template.format(
        eta_aesthetic=ALIGNMENT["aesthetic"].eta,
        eta_consistency=ALIGNMENT["consistency"].eta,
        rank=RANK,
        first=(first := f"{TIMESTEPS[0]:g}"),
        last=(last := f"{TIMESTEPS[1]:g}"),
        acts=f"timesteps=({first}, {last})",
        more_prompts=len(PROMPTS) - len(TRAIN_PROMPTS),
        styles=", ".join(STYLES),
        natural=f"{100 * tail.natural:.0f}",
        colorless=f"{100 * tail.colorless:.0f}",
        loose=f"{100 * tail.loose:.0f}",
        sizes=sizes,
        total=total,
        minutes=", ".join(f"{name} {m:.0f} min" for name, m in minutes.items()),
        recipes=recipes,
        judge_styles=", ".join(JUDGE.styles),
        reward_styles=", ".join(CONSISTENCY.styles),
        held_out_style=HELD_OUT_STYLE,
        scorers=scorers,
        table=results_table(results),
        single_table=results_table(results, single=True),
        certificate_table=certificate_table(certificate),
        certificate_seeds=certificate["setting"]["seeds"],
        certificate_range=f"0-{certificate['setting']['seeds'] - 1}",
        certificate_paths=certificate["setting"]["paths"],
        three_table=results_table(three),
        three_seeds=three["setting"]["seeds"],
        eta_warmth=ALIGNMENT["warmth"].eta,
        **accelerator_figures(),
        **setting,
    )


def main(
    results: Annotated[Path, typer.Option(help="Result file of emoji.evaluate.")] = Path(
        "benchmarks/results/emoji.json"
    ),
    three: Annotated[Path, typer.Option(help="Result file of emoji.evaluate --three.")] = Path(
        "benchmarks/results/emoji_three.json"
    ),
    certificate: Annotated[Path, typer.Option(help="Result file of msdda-fast certify.")] = Path(
        "benchmarks/results/certificate.json"
    ),
    page: Annotated[Path, typer.Option(help="Page with the marked block.")] = Path(
        "docs/results.md"
    ),
) -> None:
    """Write the card, its plot, and the marked block of the results page."""
    figures = json.loads(results.read_text())
    logs = dict.fromkeys((*LOGS, ACCELERATOR_FOLDER), "loss")
    logs |= dict.fromkeys(ADAPTER_LOGS, "reward")
    plot_training(EMOJI / "training", logs, EMOJI / "training.png")
    others = (json.loads(file.read_text()) for file in (three, certificate))
    text = card(figures, *others)
    write_atomically(EMOJI / "README.md", lambda partial: partial.write_text(text))
    block = re.compile(r"(<!-- report:emoji:begin -->\n).*?(<!-- report:emoji:end -->)", re.S)
    table = results_table(figures)
    rewritten = block.sub(lambda m: f"{m[1]}{table}\n{m[2]}", page.read_text())
    write_atomically(page, lambda partial: partial.write_text(rewritten))


if __name__ == "__main__":
    typer.run(main)
