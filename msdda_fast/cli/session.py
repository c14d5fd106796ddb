# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the terminal, common options, loading a model, reporting errors."""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from json import JSONDecodeError
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from msdda_fast.cli.objectives import objectives as parse_objectives

if TYPE_CHECKING:
    import torch

    from msdda_fast.objective import Objective

SHIPPED, SHIPPED_FLOW = "msdda-fast/emoji", "msdda-fast/emoji-flow"
# what users type is printed as it is: no markup in it, no names of emoji
out = Console(markup=False, emoji=False, highlight=False)
err = Console(markup=False, emoji=False, highlight=False, stderr=True)
#: What fails while it runs, whatever the input: memory, a full disk, a loss that is not finite.
FAILURES = (ArithmeticError, MemoryError, RuntimeError)
DISK_ERRORS = (errno.EDQUOT, errno.EIO, errno.ENOSPC)


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
        metavar="NAME=PATH[:LEVEL][@FIRST-LAST]",
        help="Adapter to use as an objective, in place of the model's own. Repeatable. "
        "PATH is a file, folder or hub id, several that act together ('PATH + PATH'), or "
        "[bold]base[/bold] for the base model; LEVEL is the noise it was trained with: eta of "
        "DDIM in \\[0, 1], by default 1, or flow-sde=0.7, dance=0.3, cps=0.8, flow-ddim=0.5; it "
        "acts in the timesteps FIRST to LAST, by default in all.",
    ),
]
StepsOption = Annotated[int, typer.Option("--steps", max=1_000_000, help="Denoising steps T.")]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance", help="Guidance scale; 1 means no guidance.", show_default="the model's own"
    ),
]
StrengthOption = Annotated[
    list[str] | None,
    typer.Option(
        "--strength",
        "-s",
        metavar="S|NAME=S",
        help="How far from the base: 1 is as trained, 0 the base. Of all objectives, or repeat "
        "with names.",
        show_default="1",
    ),
]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="Data type of the networks.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda, cuda:1, ...", show_default="cuda if available, else cpu"
    ),
]


def saved_class(model: str) -> Any:  # noqa: ANN401 - a class
    """Return the class of pipelines that --model is of; nothing is loaded yet.

    Raises:
        FileNotFoundError, ValueError: See `pipelines.saved_class`.
    """
    from msdda_fast.pipelines.saved_class import saved_class

    return saved_class(model)


def only_stable_diffusion(model: str, command: str) -> None:
    """Refuse other models, before anything is loaded.

    Raises:
        FileNotFoundError, ValueError: See `pipelines.saved_class`.
        UnsupportedNetwork: It is no Stable Diffusion 1 or 2.
    """
    from msdda_fast.errors import UnsupportedNetwork
    from msdda_fast.pipelines import MSDDAPipeline

    kind = saved_class(model)
    if kind is not MSDDAPipeline:
        raise UnsupportedNetwork(
            f"--model {model} is a {kind.__name__}, and `{command}` runs Stable Diffusion 1 and 2 "
            "only"
        )


def load(
    model: str,
    objectives: list[str] | None,
    dtype: DType,
    device: str | None,
    accelerator: str | None = None,
) -> Any:  # noqa: ANN401 - an MSDDAPipeline, or a stock pipeline with objectives
    """Load the model with the objectives of --objective, or with its own.

    Raises:
        ValueError: --device does not name a device, or --objective names one twice.
        BackendUnavailable: --device is not here.
    """
    import torch

    from msdda_fast.engine import torchrun

    chosen = parse_objectives(objectives or [])
    place = torch.device(torchrun.default_device()) if device is None else _device(device)
    with err.status(Text(f"Loading {model}")):
        pipe = _pipeline(model, chosen, getattr(torch, dtype.value), accelerator).to(place)
        parallel = torchrun.join(place)
    if parallel is not None:
        pipe.enable_parallel(parallel)
    pipe.set_progress_bar_config(leave=False, disable=err.quiet or not err.is_terminal)
    return pipe


def _pipeline(
    model: str,
    objectives: Mapping[str, Objective] | None,
    dtype: torch.dtype,
    accelerator: str | None,
) -> Any:  # noqa: ANN401 - as `load`
    from msdda_fast.emoji.flow_model import shorten_calls
    from msdda_fast.errors import MSDDAError
    from msdda_fast.pipelines import MSDDAPipeline

    more: dict[str, Any] = {} if accelerator is None else {"accelerator": accelerator}
    try:
        pipe: Any = MSDDAPipeline.from_pretrained(model, objectives=objectives, dtype=dtype, **more)
    except MSDDAError:
        raise
    except (AttributeError, JSONDecodeError, LookupError, TypeError) as error:
        # what libraries say of a folder whose files are damaged or do not belong together
        raise ValueError(
            f"--model {model} is damaged or incomplete ({type(error).__name__}: {error})"
        ) from error
    if model == SHIPPED_FLOW:
        shorten_calls(pipe)
    return pipe


def guidance_for(model: str, guidance: float | None) -> float | None:
    """Return --guidance, or what the shipped flow model's adapters were trained with.

    Objectives of a stock pipeline have no guidance of their own to say so, and its default is for
    large models.
    """
    return 1.0 if guidance is None and model == SHIPPED_FLOW else guidance


def _device(name: str) -> torch.device:
    import torch

    from msdda_fast.errors import BackendUnavailable

    match = re.fullmatch(r"(cpu)(?::0)?|mps|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"--device {name!r} must be cpu, cuda, cuda:1, ... or mps")
    if match[1]:
        return torch.device("cpu")
    if name == "mps":
        there, what = int(torch.backends.mps.is_available()), "Apple GPU"
    else:
        there, what = torch.cuda.device_count(), "CUDA GPU"
    if not there:
        raise BackendUnavailable(f"--device {name}: PyTorch finds no {what} here; use cpu")
    if int(match[2] or 0) >= there:
        raise BackendUnavailable(f"--device {name}: the last GPU here is cuda:{there - 1}")
    return torch.device(name)


def check_prompts(pipe: Any, prompts: Iterable[str]) -> None:  # noqa: ANN401 - as `load`
    """Raise `InvalidRequest` if no text encoder would read all of a prompt."""
    from msdda_fast.pipelines.prompt_length import Readers

    readers = Readers.of(pipe)
    for prompt in prompts:
        shown = f"{prompt[:60]!r}..." if len(prompt) > 60 else f"{prompt!r}"
        readers.check(prompt, f"the prompt {shown}")


def check_request(
    pipe: Any,  # noqa: ANN401 - as `load`
    prompts: Iterable[str],
    steps: int,
    guidance: float | None,
) -> None:
    """Check what every image of a run is drawn with, before a folder is bound to it.

    Raises:
        InvalidRequest: As `check_prompts`.
        InvalidSchedule: The scheduler has no such number of steps, or --guidance is not >= 1, or
            not finite where it is the stock pipeline's.
    """
    from msdda_fast.errors import InvalidSchedule
    from msdda_fast.pipelines import MSDDAPipeline
    from msdda_fast.pipelines.request import check_steps, objective_guidance
    from msdda_fast.steps.schedulers import scheduler_rule

    check_prompts(pipe, prompts)
    if isinstance(pipe, MSDDAPipeline):
        scheduler_rule(pipe.scheduler, steps)
        objective_guidance(pipe.objectives, guidance)
    else:
        check_steps(steps)
        if guidance is not None and not math.isfinite(guidance):
            raise InvalidSchedule(f"--guidance must be finite, got {guidance}")


@contextmanager
def reported(interrupted: str) -> Iterator[None]:
    """Turn bad input into a line and exit code 2, a failure into 1, Ctrl-C into 130."""
    from msdda_fast.engine import torchrun
    from msdda_fast.errors import MSDDAError, WriteFailed
    from msdda_fast.pipelines.notices import quieten

    rank = torchrun.rank()
    out.quiet = err.quiet = rank > 0
    try:
        quieten()  # before a command imports what draws
        yield
    except (MSDDAError, ValueError, OSError, *FAILURES) as error:
        err.quiet = False  # what one rank cannot do, the others cannot tell
        at = f"rank {rank}: " if rank else ""
        err.print(at, Text(type(error).__name__, "red"), ": ", sep="", end="")
        err.print(" ".join(str(error).split()), soft_wrap=True)
        is_input = isinstance(error, (MSDDAError, ValueError, OSError))
        has_failed = isinstance(error, WriteFailed) or getattr(error, "errno", None) in DISK_ERRORS
        raise typer.Exit(2 if is_input and not has_failed else 1) from None
    except KeyboardInterrupt:
        err.print(f"Stopped: {interrupted}.", soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        torchrun.leave()


@contextmanager
def drawing_progress() -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; call what it yields with the numbers of finished and of all images."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("Drawing"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"))
    bar = Progress(*columns, Remaining(), console=err)
    task = bar.add_task("Drawing", total=None)

    def show(finished: int, total: int) -> None:
        bar.start()  # not before, or bad input found late would be more than one line
        bar.update(task, completed=finished, total=total)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
