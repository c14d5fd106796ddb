# SPDX-License-Identifier: Apache-2.0
"""The command `msdda-fast`. Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from msdda_fast import cli_compare, cli_ray, cli_serve, cli_train, cli_tune, cli_values
from msdda_fast.cli_session import (
    SHIPPED,
    DeviceOption,
    DType,
    DTypeOption,
    GuidanceOption,
    ModelOption,
    ObjectiveOption,
    StepsOption,
    drawing_progress,
    load,
    out,
    reported,
)

# Everything that draws is imported inside the commands: `--help` must not wait for it.

DEMO_PROMPTS = [
    "A yellow colored dog.",
    "A pink colored banana.",
    "A black chair and a red table.",
    "A green car and a yellow banana.",
]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Balance several aligned diffusion models at inference time.",
)
app.add_typer(cli_train.app, name="train")
app.command()(cli_compare.compare)
app.command()(cli_tune.tune)
app.command()(cli_serve.serve)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            "-w",
            metavar="NAME=VALUE",
            help="Preference weight of one objective; repeat it for all, they sum to 1.",
            show_default="uniform",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="PNG to write; several images get -0, -1, ... before the suffix."
        ),
    ] = Path("out.png"),
    seed: Annotated[
        int | None,
        typer.Option(help="Of the first image; the next ones count up.", show_default="random"),
    ] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="How many.")] = 1,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance leads away from.")
    ] = None,
    model: ModelOption = SHIPPED,
    objective: ObjectiveOption = None,
    steps: StepsOption = 25,
    guidance: GuidanceOption = None,
    dtype: DTypeOption = DType.float32,
    device: DeviceOption = None,
) -> None:
    """Draw a prompt with the objectives balanced by your weights.

    [dim]msdda-fast generate "A purple colored dog." -w aesthetic=0.3 -w consistency=0.7[/dim]

    With a GPU for each objective: [dim]torchrun --nproc-per-node 2 -m msdda_fast generate ...[/dim]
    """
    with reported("no further image was written"):
        from msdda_fast.files import write_atomically
        from msdda_fast.pipeline import torchrun

        weights = dict(cli_values.pair(text, "--weight", float) for text in weight or []) or None
        pipe = load(model, objective, dtype, device)
        if seed is None:
            seed = torchrun.shared_seed(pipe.parallel)
        images = pipe(
            prompt,
            weights=weights,
            seed=seed,
            num_inference_steps=steps,
            guidance_scale=guidance,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images,
        ).images
        if torchrun.rank() > 0:
            return
        for index, image in enumerate(images):
            file = output.with_stem(f"{output.stem}-{index}") if num_images > 1 else output
            write_atomically(file, partial(image.save, format="PNG"))
            out.print(f"{file}  [dim]seed {seed + index}[/dim]", highlight=False, soft_wrap=True)


@app.command()
def sweep(
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", help="A row of the grid; repeat it.", show_default="four demo prompts"
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Weights of the objective --toward, one column each.")
    ] = "0,0.25,0.5,0.75,1",
    toward: Annotated[
        str,
        typer.Option(help="The objective that the weights favour; the other one gets the rest."),
    ] = "consistency",
    seeds: Annotated[
        str, typer.Option(help="One image per seed in every cell; the grid shows the first.")
    ] = "0",
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward", help="A reward to report; repeat it.", show_default="aesthetic, consistency"
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Finished cells stay here; run again to continue.")
    ] = Path("out/sweep"),
    batch_size: Annotated[int, typer.Option(min=1, help="Images drawn together.")] = 8,
    ray: cli_ray.RayOption = None,
    ray_gpus: cli_ray.RayGPUsOption = 0.0,
    model: ModelOption = SHIPPED,
    objective: ObjectiveOption = None,
    steps: StepsOption = 25,
    guidance: GuidanceOption = None,
    dtype: DTypeOption = DType.float32,
    device: DeviceOption = None,
) -> None:
    """Draw prompts x weights as one labelled grid, with the rewards of every column.

    Finished cells are kept: stop it with Ctrl-C and run the same command to continue.
    """
    with reported(f"finished cells are in {folder}; run the same command again to continue"):
        from msdda_fast.evaluation.sweep import Sweep, run_sweep
        from msdda_fast.pipeline import torchrun

        plan = Sweep(
            prompts=prompt or DEMO_PROMPTS,
            weights=cli_values.numbers(weights, "--weights", float),
            seeds=cli_values.numbers(seeds, "--seeds", int),
            toward=toward,
            num_inference_steps=steps,
            guidance_scale=guidance,
            rewards=reward or ("aesthetic", "consistency"),
            batch_size=batch_size,
        )
        there = cli_ray.Model(model, objective, dtype, "cuda" if ray_gpus else device)
        with cli_ray.cluster(ray, ray_gpus) as tasks:
            pipe = load(model, objective, dtype, device)
            elsewhere = tasks(partial(cli_ray.cells, there, plan))
            with torchrun.own_folder(folder, pipe.parallel) as own, drawing_progress() as progress:
                result = run_sweep(pipe, plan, own, elsewhere=elsewhere, progress=progress)
        _print_means(plan.columns, result.means)
        out.print(f"{result.grid}\n{result.rewards}", highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say what is installed, which backends can run here, and why others cannot."""
    from rich.table import Table

    from msdda_fast.pipeline.environment import findings

    for title, rows in findings(SHIPPED).items():
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for name, finding in rows.items():
            table.add_row(name, finding)
        out.print(table)


def _print_means(columns: list[float | None], means: Any) -> None:  # noqa: ANN401
    from rich.table import Table

    table = Table(title="Mean reward", title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column("SD" if column is None else f"w = {column:g}", justify="right")
    for name, values in means.items():
        table.add_row(name, *(f"{value:+.2f}" for value in values))
    out.print(table)


def main() -> None:
    """Run the command line."""
    app()
