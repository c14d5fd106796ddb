# SPDX-License-Identifier: Apache-2.0
"""`--ray`: a Ray cluster draws the images; files are written here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msdda_fast.cli.session import DType, load

if TYPE_CHECKING:
    from msdda_fast.evaluation.cell_drawer import CellDrawer
    from msdda_fast.evaluation.ray_tasks import RayTasks
    from msdda_fast.evaluation.runs import Comparison, Entry
    from msdda_fast.evaluation.shards import Shard
    from msdda_fast.evaluation.sweep import Sweep
    from msdda_fast.pipelines import MSDDAPipeline

RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Draw on the Ray cluster at HOST:PORT, or auto for the one this machine belongs to. "
        "Its nodes need the model at the same paths; finished images are kept here.",
    ),
]
RayGPUsOption = Annotated[
    float,
    typer.Option("--ray-gpus", min=0, help="GPUs per Ray task; 0 draws on CPUs."),
]


@dataclass(frozen=True)
class Model:
    """The options that name a model; a call loads it, in whichever process makes the call."""

    model: str
    objectives: list[str] | None
    dtype: DType
    device: str | None
    accelerator: str | None = None

    def __call__(self) -> Any:  # noqa: ANN401 - as `load`
        """Load the model, without a progress bar."""
        from msdda_fast.pipelines.notices import quieten

        quieten()
        pipe = load(self.model, self.objectives, self.dtype, self.device, self.accelerator)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@contextmanager
def cluster(
    address: str | None, gpus: float
) -> Iterator[Callable[[Callable[[], Any]], RayTasks[Any, Any] | None]]:
    """Connect to a cluster; yield a function that makes its job runner, or None without address.

    Raises:
        BackendUnavailable: Ray is not installed, or no cluster answers.
    """
    if address is None:
        yield lambda prepare: None
        return
    from msdda_fast.evaluation.ray_tasks import RayTasks, connected

    with connected(address):
        yield lambda prepare: RayTasks(prepare, num_cpus=1, num_gpus=gpus)


def cells(model: Model, sweep: Sweep) -> CellDrawer:
    """Return what draws the cells of a sweep; called on the cluster."""
    from msdda_fast.evaluation.cell_drawer import CellDrawer

    return CellDrawer(model(), sweep)


def shards(
    model: Model, compared: Callable[[MSDDAPipeline], Comparison]
) -> Callable[[tuple[Entry, int]], Shard]:
    """Return what draws the shards of a comparison; called on the cluster."""
    from msdda_fast.evaluation.runs import draw_shard

    pipe = model()
    draw = partial(draw_shard, pipe, compared(pipe))
    return lambda job: draw(*job)
