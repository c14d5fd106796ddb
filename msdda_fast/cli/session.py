# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the terminal, common options, loading a model, reporting errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from msdda_fast.cli import values as parse

if TYPE_CHECKING:
    import torch

    from msdda_fast.pipelines import MSDDAPipeline

SHIPPED = "msdda-fast/emoji"
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
        help="Adapter to use as an objective, in place of the model's own. Repeatable. "
        "PATH is a file, folder or hub id, or [bold]base[/bold] for the base model; "
        "ETA is its DDIM stochasticity in [0, 1], by default 1.",
    ),
]
StepsOption = Annotated[int, typer.Option("--steps", help="Denoising steps T.")]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance", help="Guidance scale; 1 means no guidance.", show_default="the model's own"
    ),
]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="Data type of the networks.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda, cuda:1, ...", show_default="cuda if available, else cpu"
    ),
]


def load(
    model: str, objectives: list[str] | None, dtype: DType, device: str | None
) -> MSDDAPipeline:
    """Load the model with the objectives of --objective, or with its own.

    Raises:
        ValueError: --device does not name a device.
        BackendUnavailable: --device is a GPU, and PyTorch finds none.
    """
    import torch

    from msdda_fast.engine import torchrun
    from msdda_fast.pipelines import MSDDAPipeline

    chosen = dict(parse.objective(text) for text in objectives or []) or None
    place = _device(device) if device else torch.device(torchrun.default_device())
    with err.status(f"Loading {model}"):
        pipe = MSDDAPipeline.from_pretrained(
            model, objectives=chosen, dtype=getattr(torch, dtype.value)
        ).to(place)
        parallel = torchrun.join(place)
    if parallel is not None:
        pipe.enable_parallel(parallel)
    pipe.set_progress_bar_config(leave=False, disable=err.quiet or not err.is_terminal)
    return pipe


def _device(name: str) -> torch.device:
    import torch

    from msdda_fast.errors import BackendUnavailable

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} must be cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(f"--device {name}: PyTorch finds no CUDA GPU here; use cpu")
    return device


@contextmanager
def reported(interrupted: str) -> Iterator[None]:
    """Turn bad input into one line and exit code 2, Ctrl-C into a line and 130."""
    from msdda_fast.engine import torchrun
    from msdda_fast.errors import MSDDAError
    from msdda_fast.pipelines.notices import quieten

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
def drawing_progress() -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; call what it yields with the numbers of finished and of all images."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("Drawing"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"))
    with Progress(*columns, Remaining(), console=err) as bar:
        task = bar.add_task("Drawing", total=None)
        yield lambda finished, total: bar.update(task, completed=finished, total=total)
