# SPDX-License-Identifier: Apache-2.0
"""The command `msdda-fast`. Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from msdda_fast import cli_values

if TYPE_CHECKING:
    from msdda_fast.pipeline import MSDDAPipeline

# Everything that draws is imported inside the commands: `--help` must not wait for it.

SHIPPED = "msdda-fast/emoji"
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
out = Console()
err = Console(stderr=True)


class DType(StrEnum):
    """Network dtypes, by torch's names."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Hub id, local folder, or the shipped model.")
]
ObjectiveOption = Annotated[
    list[str] | None,
    typer.Option(
        "--objective",
        metavar="NAME=PATH[:ETA]",
        help="An adapter to use as an objective, in place of the model's own; repeat it. "
        "PATH is a file, folder or hub id, or [bold]base[/bold] for the base model.",
    ),
]
StepsOption = Annotated[int, typer.Option("--steps", help="Denoising steps T.")]
GuidanceOption = Annotated[
    float | None,
    typer.Option("--guidance", help="Guidance scale, 1 for none.", show_default="the model's own"),
]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="What the networks compute in.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...", show_default="cuda or cpu")
]


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
    with _reported("no further image was written"):
        from msdda_fast.files import write_atomically
        from msdda_fast.pipeline import torchrun

        weights = dict(cli_values.pair(text, "--weight", float) for text in weight or []) or None
        pipe = _load(model, objective, dtype, device)
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
    with _reported(f"finished cells are in {folder}; run the same command again to continue"):
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
        pipe = _load(model, objective, dtype, device)
        with torchrun.own_folder(folder, pipe.parallel) as own, _progress() as progress:
            result = run_sweep(pipe, plan, own, progress=progress)
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


def _load(
    model: str, objectives: list[str] | None, dtype: DType, device: str | None
) -> MSDDAPipeline:
    """Load the model with the objectives of --objective, or its own."""
    import torch

    from msdda_fast.pipeline import MSDDAPipeline, torchrun

    chosen = dict(cli_values.objective(text) for text in objectives or []) or None
    place = torch.device(device or torchrun.default_device())
    with err.status(f"Loading {model}"):
        pipe = MSDDAPipeline.from_pretrained(
            model, objectives=chosen, dtype=getattr(torch, dtype.value)
        ).to(place)
        parallel = torchrun.join(place)
    if parallel is not None:
        pipe.enable_parallel(parallel)
    pipe.set_progress_bar_config(leave=False, disable=err.quiet or not err.is_terminal)
    return pipe


@contextmanager
def _reported(interrupted: str) -> Iterator[None]:
    """Turn bad input into one line and exit code 2, Ctrl-C into a line and 130."""
    from msdda_fast.errors import MSDDAError
    from msdda_fast.pipeline import torchrun
    from msdda_fast.pipeline.notices import quieten

    rank = torchrun.rank()
    out.quiet = err.quiet = rank > 0
    try:
        quieten()  # before a command imports what draws
        yield
    except (MSDDAError, ValueError, OSError) as error:
        err.quiet = False  # what one rank cannot do, the others cannot tell
        at = f"rank {rank}: " if rank else ""
        err.print(f"{at}[red]{type(error).__name__}[/red]: ", end="")
        err.print(" ".join(str(error).split()), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        err.print(f"Stopped: {interrupted}.", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        torchrun.leave()


@contextmanager
def _progress() -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("Drawing"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"))
    with Progress(*columns, Remaining(), console=err) as bar:
        task = bar.add_task("Drawing", total=None)
        yield lambda finished, total: bar.update(task, completed=finished, total=total)


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
