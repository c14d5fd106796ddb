# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast compare`: every system of the paper, side by side."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msdda_fast.cli import cluster
from msdda_fast.cli import values as parse
from msdda_fast.cli.comparison import (
    JudgeOption,
    PartOption,
    PromptsOption,
    RewardOption,
    TowardOption,
    objectives,
    require_packages,
    reward_names,
    rewards,
)
from msdda_fast.cli.session import (
    SHIPPED,
    DeviceOption,
    DType,
    DTypeOption,
    GuidanceOption,
    ModelOption,
    ObjectiveOption,
    StepsOption,
    check_request,
    drawing_progress,
    guidance_for,
    load,
    out,
    reported,
)
from msdda_fast.cli.sweep import check_family

if TYPE_CHECKING:
    from collections.abc import Mapping

    from msdda_fast.evaluation.runs import Comparison
    from msdda_fast.methods.method import Pipeline

#: Of --quick.
QUICK_PROMPTS, QUICK_STEPS = 4, 25
#: Preferences over three objectives: a lattice in quarters.
SIMPLEX = tuple((a / 4, b / 4, (4 - a - b) / 4) for a in range(5) for b in range(5 - a))


def compare(
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of scores, tables, figures and the page.")
    ] = Path("out/compare"),
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of finished images; run again to continue.", show_default="OUT/work"
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Preview in minutes, on few prompts and seeds.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Only remake the tables, figures and page.")
    ] = False,
    systems: Annotated[
        str | None, typer.Option(help="Comma-separated names of systems.", show_default="all")
    ] = None,
    weights: Annotated[str, typer.Option(help="Comma-separated weights w.")] = "0.2,0.5,0.8",
    seeds: Annotated[
        str, typer.Option(help="Seeds of every prompt, such as 0-31 or 0,1,5.")
    ] = "0-31",
    search_seeds: Annotated[
        str, typer.Option(help="Seeds for systems that evaluate rewards while sampling.")
    ] = "0,1",
    front: Annotated[
        str, typer.Option(help="Additional weights w for the Pareto figure.")
    ] = "0,0.35,0.65,1",
    front_seeds: Annotated[
        str, typer.Option(help="Seeds for those, for variants, and for three objectives.")
    ] = "0-7",
    factor_soup: Annotated[
        bool, typer.Option(help="Include RS with merged factors; needs adapters of equal rank.")
    ] = True,
    tuned: Annotated[
        Path | None, typer.Option(help="tuned.json written by [bold]msdda-fast tune[/bold].")
    ] = None,
    oracle: Annotated[
        list[str] | None,
        typer.Option(
            metavar="W=PATH", help="Adapter trained on r_w, for the MORL oracle. Repeatable."
        ),
    ] = None,
    oracle_timesteps: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="First and last timestep in which those adapters act; the base does outside.",
            show_default="all",
        ),
    ] = None,
    path_kl_seeds: Annotated[
        str, typer.Option(help="Seeds for the path KL to the base, a column of floors.md.")
    ] = "",
    prompts: PromptsOption = None,
    reward: RewardOption = None,
    judge: JudgeOption = None,
    toward: TowardOption = None,
    part: PartOption = "0/1",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per batch.", show_default="all prompts")
    ] = None,
    ray: cluster.RayOption = None,
    ray_gpus: cluster.RayGPUsOption = 0.0,
    model: ModelOption = SHIPPED,
    objective: ObjectiveOption = None,
    steps: StepsOption = 50,
    guidance: GuidanceOption = None,
    dtype: DTypeOption = DType.float32,
    device: DeviceOption = None,
) -> None:
    """Compare every system of the paper: tables, a Pareto front and images on one page.

    Finished images are kept: stop with Ctrl-C and run the same command to continue.
    """
    work = work or folder / "work"
    stopped = f"finished images are in {work}; run the same command again to continue"
    with reported(stopped), cluster.cluster(ray, ray_gpus) as tasks:
        require_packages()
        from msdda_fast.emoji.prompts import TEST_PROMPTS
        from msdda_fast.evaluation.compare import compare, report_scores
        from msdda_fast.evaluation.plan import plan_for
        from msdda_fast.evaluation.tuning import load_tuned
        from msdda_fast.files import check_folder

        check_folder(folder)
        if report_only:
            _show(report_scores(folder))
            return
        preferences = parse.numbers(weights, "--weights", float)
        chosen_part = parse.part(part)
        texts = parse.prompts(prompts) if prompts else list(TEST_PROMPTS)
        settings = load_tuned(tuned) if tuned else {}
        oracles = parse.pairs(map(_oracle, oracle or []), "--oracle")
        scored_by = reward_names(reward)
        judges = parse.distinct(judge or [], "--judge")
        chosen = [name.strip() for name in systems.split(",")] if systems else []
        chosen = parse.distinct(chosen, "--systems")
        drawn = {
            "seeds": parse.seeds(seeds, "--seeds"),
            "search_seeds": parse.seeds(search_seeds, "--search-seeds"),
            "front": parse.numbers(front, "--front", float) if front else [],
            "path_kl_seeds": parse.seeds(path_kl_seeds, "--path-kl-seeds") if path_kl_seeds else [],
            "front_seeds": parse.seeds(front_seeds, "--front-seeds"),
        }
        check_folder(work)
        there = cluster.Model(model, objective, dtype, "cuda" if ray_gpus else device)
        guidance = guidance_for(model, guidance)
        check_family(model, guidance)
        pipe = load(model, objective, dtype, device)
        check_request(pipe, texts, steps, guidance)
        names = objectives(pipe, toward)
        plan = plan_for(
            pipe,
            objectives=names,
            preferences=preferences,
            **drawn,
            simplex=SIMPLEX if len(names) == 3 else (),
            tuned=settings,
            oracles=oracles,
            oracle_timesteps=oracle_timesteps,
            factor_soup=factor_soup,
            systems=chosen or None,
        )
        if quick:
            few = -(-len(texts) // QUICK_PROMPTS)
            texts, steps = texts[::few], QUICK_STEPS
            plan = replace(
                plan, seeds=(0, 1), search_preferences=(0.5,), search_seeds=(0,), front=(),
                front_seeds=(0,), simplex=(),
            )  # fmt: skip
        compared = partial(
            _comparison, names=names, reward=scored_by, judge=judges, prompts=texts,
            num_inference_steps=steps, guidance_scale=guidance, batch_size=batch_size,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        comparison = compared(pipe)
        with drawing_progress() as progress:
            page = compare(
                pipe, comparison, plan, work, folder, title=f"Systems compared on {model}",
                part=chosen_part, elsewhere=tasks(partial(cluster.shards, there, compared)),
                progress=progress,
            )  # fmt: skip
        if page is not None:
            _show(page)


def _oracle(text: str) -> tuple[float, Path]:
    form = "W=PATH with W in [0, 1], such as 0.5=my/adapter"
    w, path = parse.pair(text, "--oracle", Path, form)
    weight = parse.preference(w, f"--oracle {text!r} must be {form}")
    if not path.exists():
        raise FileNotFoundError(f"--oracle {text!r}: no file or folder at {path}")
    return weight, path


def _comparison(
    pipe: Pipeline,
    *,
    names: list[str],
    reward: Mapping[str, str],
    judge: list[str],
    **settings: Any,  # noqa: ANN401 - of `Comparison`
) -> Comparison:
    from msdda_fast.evaluation.runs import Comparison

    scored = {**rewards(judge, {}, pipe), **rewards(names, reward, pipe)}
    return Comparison(rewards=scored, **settings)


def _show(page: Path) -> None:
    """Print the tables of table.csv, and the path of the page."""
    from rich.box import SIMPLE
    from rich.table import Table

    with (page.parent / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    weighed = [item.split("=")[0] for item in rows[0]["weights"].split()]
    for weights in dict.fromkeys(row["weights"] for row in rows):
        table = Table(title=weights, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("system", no_wrap=True, overflow="ellipsis", max_width=27)
        for name in ("n", *weighed, "r_w", "MSDDA - system"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in (row for row in rows if row["weights"] == weights):
            label = " ".join(filter(None, (row["method"], row["variant"])))
            gain = [row[f"msdda_minus_system{end}"] for end in ("", "_low", "_high")]
            low, high = (float(bound or 0) for bound in gain[1:])
            shown = f"{float(gain[0]):+.3f} {'*' if low * high > 0 else ' '}" if gain[0] else ""
            means = [f"{float(row[name]):+.3f}" for name in (*weighed, "scalarised")]
            table.add_row(label, row["images"], *means, shown, style=None if shown else "bold")
        out.print(table)
    out.print("* the 95% interval of the paired difference excludes 0")
    out.print(page, soft_wrap=True)
