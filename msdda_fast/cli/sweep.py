# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast sweep`: prompts times weights as one grid."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from msdda_fast.cli import cluster
from msdda_fast.cli import draw_options as options
from msdda_fast.cli import values as parse
from msdda_fast.cli.session import (
    SHIPPED,
    DeviceOption,
    DType,
    DTypeOption,
    GuidanceOption,
    ModelOption,
    ObjectiveOption,
    StrengthOption,
    check_request,
    drawing_progress,
    guidance_for,
    load,
    out,
    reported,
    saved_class,
)

__all__ = ["check_family", "sweep"]

DEMO_PROMPTS = [
    "A yellow colored dog.",
    "A pink colored banana.",
    "A black chair and a red table.",
    "A green car and a yellow banana.",
]


def sweep(
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="Prompt of one row of the grid. Repeatable.",
            show_default="four demo prompts",
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Comma-separated weights of --toward, one column each.")
    ] = "0,0.25,0.5,0.75,1",
    toward: Annotated[
        str,
        typer.Option(help="Objective that the weights belong to; the other one gets the rest."),
    ] = "consistency",
    strength: StrengthOption = None,
    seeds: Annotated[
        str, typer.Option(help="Comma-separated seeds; the grid shows images of the first one.")
    ] = "0",
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            help="Reward to report. Repeatable.",
            show_default="aesthetic, consistency",
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of finished cells; run again to continue.")
    ] = Path("out/sweep"),
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 8,
    ray: cluster.RayOption = None,
    ray_gpus: cluster.RayGPUsOption = 0.0,
    model: ModelOption = SHIPPED,
    objective: ObjectiveOption = None,
    accelerator: options.AcceleratorOption = None,
    steps: options.DrawnStepsOption = None,
    guidance: GuidanceOption = None,
    dtype: DTypeOption = DType.float32,
    device: DeviceOption = None,
) -> None:
    """Draw prompts x weights as one labelled grid, with the rewards of every column.

    Finished cells are kept: stop with Ctrl-C and run the same command to continue.
    """
    with reported(f"finished cells are in {folder}; run the same command again to continue"):
        from msdda_fast.engine import torchrun
        from msdda_fast.evaluation.cell_drawer import base_label
        from msdda_fast.evaluation.sweep import Sweep, run_sweep
        from msdda_fast.files import check_folder

        guidance = guidance_for(model, guidance)
        plan = Sweep(
            prompts=prompt or DEMO_PROMPTS,
            weights=parse.numbers(weights, "--weights", float),
            seeds=[parse.seed(s, "--seeds") for s in parse.numbers(seeds, "--seeds", int)],
            toward=toward,
            num_inference_steps=options.STEPS if steps is None else steps,
            strength=parse.strength(strength or []),
            guidance_scale=guidance,
            rewards=parse.distinct(reward or ("aesthetic", "consistency"), "--reward"),
            batch_size=batch_size,
        )
        check_family(model, guidance)
        there = cluster.Model(model, objective, dtype, "cuda" if ray_gpus else device, accelerator)
        if torchrun.rank() == 0:
            check_folder(folder)
        with cluster.cluster(ray, ray_gpus) as tasks:
            pipe = load(model, objective, dtype, device, accelerator)
            plan = replace(plan, num_inference_steps=options.steps_of(steps, pipe))
            check_request(pipe, plan.prompts, plan.num_inference_steps, guidance)
            elsewhere = tasks(partial(cluster.cells, there, plan))
            parallel = getattr(pipe, "parallel", None)
            with torchrun.own_folder(folder, parallel) as own, drawing_progress() as progress:
                result = run_sweep(pipe, plan, own, elsewhere=elsewhere, progress=progress)
        _print_means(plan.columns, result.means, base_label(pipe))
        out.print(f"{result.grid}\n{result.rewards}", soft_wrap=True)


def check_family(model: str, guidance: float | None) -> None:
    """Refuse, before it is loaded, a model that draws no images from prompts alone."""
    from msdda_fast.errors import UnsupportedNetwork
    from msdda_fast.pipelines.stock_call import StockCall
    from msdda_fast.pipelines.tasks import check_from_text

    kind = saved_class(model)
    check_from_text(kind)
    call = StockCall.of(kind)
    if call.makes != "images":
        raise UnsupportedNetwork(f"--model {model}: {call.kind} makes {call.makes}, not images")
    if guidance is not None:
        call.check(["guidance_scale"], {"guidance_scale": "--guidance"})


def _print_means(columns: list[float | None], means: Any, base: str) -> None:  # noqa: ANN401
    from rich.table import Table

    table = Table(title="Mean reward", title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(base if column is None else f"w = {column:g}", justify="right")
    for name, values in means.items():
        table.add_row(name, *(f"{value:+.2f}" for value in values))
    out.print(table)
