# SPDX-License-Identifier: Apache-2.0
r"""Prompts x preferences: images, a labelled grid, and rewards. Resumable, cell by cell.

w is the weight of one objective, `toward`; the other one gets 1 - w, so a column is the paper's
`r_w = w r_1 + (1 - w) r_2`. The base model has a column of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from msdda_fast.errors import InvalidWeights, UnknownObjective
from msdda_fast.evaluation.cell_drawer import CellDrawer, Pipeline, base_label
from msdda_fast.evaluation.cells import Cell, SweepFolder
from msdda_fast.evaluation.grid import labelled_grid
from msdda_fast.evaluation.settings import write_json
from msdda_fast.files import write_atomically
from msdda_fast.pipelines.identity import model_identity
from msdda_fast.pipelines.preferences import call_strength
from msdda_fast.rewards import load_reward
from msdda_fast.rewards.checks import check_scores

__all__ = ["Sweep", "SweepResult", "run_sweep"]

#: Draws batches of cells in another place, and yields them in any order.
Elsewhere = Callable[[Sequence[list[Cell]]], Iterable[tuple[list[Cell], Sequence[Image.Image]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What to draw, validated on construction.

    Args:
        prompts: At least one, all distinct.
        weights: Preference weights w of `toward`, in [0, 1], no unit; the columns after the base.
        seeds: Every cell has one image per seed; the grid shows the first.
        toward: The objective that w is the weight of.
        num_inference_steps: T.
        strength: s >= 0, how far from the base objectives go: 1 as trained, 0 the base; a number,
            or by name, 1 for those not named; None: 1.
        guidance_scale: >= 1; None: the model's own.
        rewards: Names for `load_reward`.
        batch_size: Images per call of the pipeline. Whatever shares the batch, the noise is the
            same to the bit and the image to the last rounding.

    Raises:
        InvalidWeights: A weight is outside [0, 1].
        ValueError: Prompts, weights or seeds are empty or repeat; or the batch size is below 1.
    """

    prompts: Sequence[str]
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    seeds: Sequence[int] = (0,)
    toward: str = "consistency"
    num_inference_steps: int = 25
    strength: float | Mapping[str, float] | None = None
    guidance_scale: float | None = None
    rewards: Sequence[str] = ("aesthetic", "consistency")
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("prompts", "weights", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be non-empty and distinct, got {list(values)}")
        for weight in self.weights:
            if not 0.0 <= weight <= 1.0:
                raise InvalidWeights(f"weights of a sweep lie in [0, 1], got {weight!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def columns(self) -> list[float | None]:
        """The base model (None), then the weights."""
        return [None, *map(float, self.weights)]

    @property
    def cells(self) -> list[Cell]:
        """Every image, column by column."""
        return [
            Cell(prompt, weight, seed)
            for weight in self.columns
            for seed in self.seeds
            for prompt in self.prompts
        ]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """The files of a sweep, and the mean reward of each column.

    Attributes:
        grid: PNG file.
        rewards: JSON file of every cell and the means.
        means: For each reward, one number per column: the base, then the weights.
    """

    grid: Path
    rewards: Path
    means: Mapping[str, Sequence[float]]


def run_sweep(
    pipe: Pipeline,
    sweep: Sweep,
    folder: Path,
    *,
    elsewhere: Elsewhere | None = None,
    progress: Callable[[int, int], None] = lambda finished, total: None,
) -> SweepResult:
    """Draw the missing cells, then the grid, and score all cells.

    Args:
        pipe: A pipeline of images with two objectives, one of them `sweep.toward`.
        sweep: What to draw.
        folder: Folder of finished cells; a later call continues, or adds prompts, weights, seeds.
            After a kill the same call draws the same batches, and ends with the same bits.
        elsewhere: Draws cells in place of `pipe`, with the same model.
        progress: Called with the numbers of finished and of all cells, first before any is drawn.

    Raises:
        UnknownObjective: `sweep.toward`, or a name in `sweep.strength`, is not an objective of the
            pipeline.
        InvalidWeights: A strength is negative or not finite.
        ValueError: The pipeline does not have two objectives; or a reward is unknown or cannot
            score a prompt.
        ResumeMismatch: The folder holds cells of another model or other settings.
    """
    names = list(pipe.objectives)
    if sweep.toward not in names:
        raise UnknownObjective(f"unknown objective {sweep.toward!r}; known: {', '.join(names)}")
    if len(names) != 2:
        raise ValueError(f"a sweep needs two objectives, this model has {', '.join(names)}")
    rewards = [load_reward(name) for name in sweep.rewards]
    for reward in rewards:  # a prompt that cannot be judged is found before hours of drawing
        reward(torch.zeros(len(sweep.prompts), 3, 64, 64), sweep.prompts)
    store = SweepFolder(folder, _settings(pipe, sweep), sweep.cells)
    _draw_missing(elsewhere or _here(pipe, sweep), sweep, store, progress)
    store.bind()

    other = next(name for name in names if name != sweep.toward)
    grid = labelled_grid(
        [
            [store.load(Cell(prompt, weight, sweep.seeds[0])) for weight in sweep.columns]
            for prompt in sweep.prompts
        ],
        sweep.prompts,
        [_label(weight, sweep.toward, other, base_label(pipe)) for weight in sweep.columns],
    )
    write_atomically(folder / "grid.png", lambda file: grid.save(file, format="PNG"))

    cells = sweep.cells
    images = _as_batch([store.load(cell) for cell in cells])
    prompts = [cell.prompt for cell in cells]
    scores = {
        reward.name: check_scores(reward.name, reward(images, prompts), prompts).tolist()
        for reward in rewards
    }
    size = len(cells) // len(sweep.columns)
    means = {
        name: [sum(values[i : i + size]) / size for i in range(0, len(cells), size)]
        for name, values in scores.items()
    }
    report = {
        "toward": sweep.toward,
        "columns": sweep.columns,
        "means": means,
        "cells": [
            {
                **asdict(cell),
                "file": store.relative(cell),
                "rewards": {name: values[i] for name, values in scores.items()},
            }
            for i, cell in enumerate(cells)
        ],
    }
    write_json(folder / "rewards.json", report)
    return SweepResult(folder / "grid.png", folder / "rewards.json", means)


def _here(pipe: Pipeline, sweep: Sweep) -> Elsewhere:
    draw = CellDrawer(pipe, sweep)
    return lambda batches: ((batch, draw(batch)) for batch in batches)


def _draw_missing(
    elsewhere: Elsewhere,
    sweep: Sweep,
    store: SweepFolder,
    progress: Callable[[int, int], None],
) -> None:
    total = len(sweep.cells)
    finished = sum(store.has(cell) for cell in sweep.cells)
    progress(finished, total)
    for batch, images in elsewhere(list(_batches(sweep, store))):
        for cell, image in zip(batch, images, strict=True):
            finished += store.add(cell, image)
        progress(finished, total)


def _batches(sweep: Sweep, store: SweepFolder) -> Iterator[list[Cell]]:
    """Yield batches of one column that lack a cell.

    Batches are of all cells, finished or not: what is drawn after a kill rounds as without one.
    """
    for weight in sweep.columns:
        column = [cell for cell in sweep.cells if cell.weight == weight]
        for start in range(0, len(column), sweep.batch_size):
            batch = column[start : start + sweep.batch_size]
            if not all(store.has(cell) for cell in batch):
                yield batch


def _settings(pipe: Pipeline, sweep: Sweep) -> dict[str, Any]:
    """Return everything that an image depends on besides prompt, weight and seed."""
    names = list(pipe.objectives)
    every = torch.ones(1, 1, len(names), dtype=torch.float64)
    strength = call_strength(names, sweep.strength, None, every, 1)
    return {
        "toward": sweep.toward,
        "strength": None if strength is None else dict(zip(names, *strength.tolist(), strict=True)),
        "num_inference_steps": sweep.num_inference_steps,
        "guidance_scale": sweep.guidance_scale,
        **model_identity(pipe),
    }


def _label(weight: float | None, toward: str, other: str, base: str) -> str:
    if weight is None:
        return "SD\nbase model" if base == "SD" else base
    only = {0.0: other, 1.0: toward}.get(weight)
    return f"w = {weight:g}" + (f"\n{only} only" if only else "")


def _as_batch(images: Sequence[Image.Image]) -> torch.Tensor:
    """Return images as (N, 3, H, W) float32 in [0, 1]."""
    size = images[0].size
    pixels = torch.frombuffer(bytearray(b"".join(i.tobytes() for i in images)), dtype=torch.uint8)
    return pixels.view(len(images), size[1], size[0], 3).permute(0, 3, 1, 2).float() / 255
