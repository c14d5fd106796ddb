# SPDX-License-Identifier: Apache-2.0
"""What a call of a stock pipeline prefers: which objectives run, and with which weights where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from msdda_fast.errors import InvalidWeights
from msdda_fast.pipelines.batch import Batch
from msdda_fast.pipelines.latent_grid import weights_of_latents
from msdda_fast.pipelines.preferences import StrengthsLike, call_strength
from msdda_fast.pipelines.regions import Regions
from msdda_fast.steps.pixels import PixelWeights
from msdda_fast.types import WeightSchedule
from msdda_fast.weight_ranges import alternatives, has_ranges
from msdda_fast.weights import preference_weights

__all__ = ["CallPreferences", "check_kl_weights"]


class CallPreferences(NamedTuple):
    """Checked preferences of a call.

    Attributes:
        names: Of the objectives, in order.
        rows: (T, B, M) float64 on the host; of weights by ranges of timesteps each that occurs.
        schedule: The same for a fused scheduler, of the objectives that run.
        columns: The objectives that run: some image has weight on them.
        regions: Masks, or None.
    """

    names: list[str]
    rows: Tensor
    schedule: WeightSchedule
    columns: list[int]
    regions: Regions | None

    @classmethod
    def of(
        cls,
        batch: Batch,
        weights: WeightSchedule,
        names: list[str],
        regions: Regions | None,
        *,
        extrapolate: bool,
    ) -> Self:
        """Check weights and masks.

        Raises:
            InvalidShape, InvalidWeights, UnknownObjective: See `preference_schedule` and `Regions`.
        """

        def read(form: Any, images: int) -> Tensor:  # noqa: ANN401 - `WeightsLike`
            copies = batch.copies if images == batch.images else 1
            return preference_weights(
                form, names, images, images_per_prompt=copies, extrapolate=extrapolate
            )

        ranged = has_ranges(weights, names)
        if ranged:
            forms = alternatives(weights, names)
            rows = torch.stack([read(form, batch.images) for form in forms])
        else:
            rows = batch.weights(weights, names, extrapolate=extrapolate)
        seen = rows
        if regions is not None:
            regions = regions.covered_with(rows)
            seen = regions.coarse().mean(rows)
        columns = [m for m in range(len(names)) if bool((seen[..., m] != 0).any())]

        def chosen(rows: Tensor) -> Tensor:
            return _of_columns(rows, columns, regions)

        schedule = (
            _by_range(batch, weights, names, chosen, read) if ranged else _by_step(chosen(rows))
        )
        return cls(names, rows, schedule, columns, regions)

    def strength(
        self,
        strength: StrengthsLike | None,
        kl_weights: Mapping[str, float] | Sequence[float] | None,
        copies: int,
    ) -> Tensor | None:
        """Return `call_strength` of all objectives.

        Raises:
            InvalidWeights: KL weights, whose mean depends on the weights, with weights of every
                pixel or by ranges of timesteps.
            UnknownObjective, InvalidShape: As `call_strength`.
        """
        check_kl_weights(kl_weights, self.regions)
        if kl_weights is not None and isinstance(self.schedule, (list, Mapping)):
            raise InvalidWeights(
                "kl_weights make strengths of the weights of a step, and weights by ranges of "
                "timesteps are not known before the loop of this pipeline: give a callable"
            )
        return call_strength(self.names, strength, kl_weights, self.rows, copies)

    def pixels(self, pipe: Any) -> Callable[[Tensor | None], PixelWeights] | None:  # noqa: ANN401
        """Return the weights of every pixel as a function of the state, for those that run.

        Without a state they are averages over the image, which stand for them in checks.

        Args:
            pipe: The pipeline.
        """
        if (regions := self.regions) is None:
            return None
        columns, made = self.columns, {}

        def of(sample: Tensor | None) -> PixelWeights:
            if sample is None:
                return regions.coarse().columns(columns)
            if (shape := tuple(sample.shape)) not in made:
                made[shape] = weights_of_latents(pipe, regions, sample).columns(columns)
            return made[shape]

        return of


def check_kl_weights(kl_weights: object, regions: Regions | None) -> None:
    """Raise `InvalidWeights` for KL weights with masks, which would make strengths of pixels."""
    if kl_weights is not None and regions is not None:
        raise InvalidWeights(
            "kl_weights with masks would give every pixel another strength: give strengths instead"
        )


def _of_columns(rows: Tensor, columns: list[int], regions: Regions | None) -> Tensor:
    """The weights (..., M) of some objectives, which sum to 1.

    Only masks leave out objectives that have weight. What is left then counts in its proportions.
    """
    rows = rows[..., columns]
    if regions is None:
        return rows
    total = rows.sum(-1, keepdim=True)
    return torch.where(total > 0, rows / total, 1 / len(columns))


def _by_range(
    batch: Batch,
    weights: Any,  # noqa: ANN401 - for which `has_ranges`
    names: list[str],
    chosen: Callable[[Tensor], Tensor],
    read: Callable[[Any, int], Tensor],
) -> WeightSchedule:
    """Weights by ranges of timesteps, as numbers of some objectives."""
    if isinstance(weights, Mapping):
        whole: Any = {key: chosen(read(form, batch.images)) for key, form in weights.items()}
        return whole  # type: ignore[no-any-return]
    entries = []
    for entry in weights:
        if has_ranges(entry, names):
            made: Any = {key: chosen(read(form, 1))[0].tolist() for key, form in entry.items()}
        else:
            made = chosen(read(entry, 1))[0].tolist()
        entries += [made] * (batch.images // len(weights))
    return entries


def _by_step(rows: Tensor) -> WeightSchedule:
    """(T, B, M) -> (M,) or (B, M) where steps agree, else a callable from the step to either."""
    if bool((rows == rows[:, :1]).all()):
        rows = rows[:, 0]
    if bool((rows == rows[:1]).all()):
        return rows[0]
    return lambda k: rows[k]
