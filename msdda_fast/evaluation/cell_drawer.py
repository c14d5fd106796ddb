# SPDX-License-Identifier: Apache-2.0
"""Draws cells of a sweep, with any pipeline of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from msdda_fast.evaluation.cells import Cell
from msdda_fast.objective import Objective
from msdda_fast.pipelines import MSDDAPipeline
from msdda_fast.pipelines.attach import WithObjectives, attach
from msdda_fast.pipelines.manifest import NAMELESS
from msdda_fast.pipelines.stock_call import StockCall

if TYPE_CHECKING:
    from msdda_fast.evaluation.sweep import Sweep

__all__ = ["CellDrawer", "Pipeline", "base_label"]

Pipeline = MSDDAPipeline | WithObjectives


def base_label(pipe: Pipeline) -> str:
    """Return what the base model is called: SD, as in the paper, where it is Stable Diffusion."""
    return "SD" if isinstance(pipe, MSDDAPipeline) else "base"


class CellDrawer:
    """Draws cells of one sweep.

    Args:
        pipe: A pipeline with two objectives, one of them `sweep.toward`.
        sweep: The sweep.
    """

    def __init__(self, pipe: Pipeline, sweep: Sweep) -> None:
        self._base = _base(pipe)
        self._base.set_progress_bar_config(disable=True)
        self._pipe, self._sweep = pipe, sweep
        self._given = StockCall.of(type(pipe)).arguments(guidance_scale=sweep.guidance_scale)
        self._strength = StockCall.of(type(pipe)).arguments(strength=sweep.strength)
        self._other = next(name for name in pipe.objectives if name != sweep.toward)

    def __call__(self, batch: Sequence[Cell]) -> list[Image.Image]:
        """Draw cells of one column together."""
        sweep, weight = self._sweep, batch[0].weight
        chosen = None if weight is None else {sweep.toward: weight, self._other: 1.0 - weight}
        pipe: Any = self._base if weight is None else self._pipe
        images: list[Image.Image] = pipe(
            prompt=[cell.prompt for cell in batch],
            weights=chosen,
            seed=[cell.seed for cell in batch],
            num_inference_steps=sweep.num_inference_steps,
            **self._given,
            **({} if weight is None else self._strength),
        ).images
        return images


def _base(pipe: Pipeline) -> Any:  # noqa: ANN401 - as `pipe`
    """The base model at the first objective's guidance and noise.

    With others, the columns would differ in more than w.
    """
    first = next(iter(pipe.objectives.values()))
    if isinstance(pipe, MSDDAPipeline):
        reference = Objective(guidance_scale=first.guidance_scale)
        return MSDDAPipeline.from_pipe(pipe, objectives={"SD": reference})
    stock: Any = pipe
    reference = Objective(eta=first.eta, noise=first.noise)
    sets = {"base": pipe.base_set, NAMELESS: pipe.base_set}
    return attach(stock, {"base": reference}, sets, pipe.accelerator)
