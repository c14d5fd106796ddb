# SPDX-License-Identifier: Apache-2.0
"""The weights of one run of a fused scheduler, in whatever form they were given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape
from msdda_fast.levels import Levels
from msdda_fast.steps.pixels import PixelWeights
from msdda_fast.weight_ranges import alternatives, by_timestep, has_ranges
from msdda_fast.weights import as_host_float64, preference_weights

if TYPE_CHECKING:
    from msdda_fast.types import WeightSchedule

__all__ = ["StepWeights", "count_of"]


class StepWeights:
    """Preferences as a function of the step.

    Args:
        weights: As in `fused_scheduler`.
        count: M.
        extrapolate: Accept negative ones.
        timesteps: (T,) of the run; None: not set yet.

    Attributes:
        table: What `rule_table` takes for them: (M,), (B, M), a callable, or None.
        pixels: Those of every pixel, if that is what was given.

    Raises:
        InvalidWeights: Off the simplex, or ranges of timesteps that overlap or leave some out.
        InvalidShape: Of another M.
    """

    def __init__(
        self, weights: WeightSchedule, count: int, *, extrapolate: bool, timesteps: Tensor | None
    ) -> None:
        self._count, self._extrapolate = count, extrapolate
        self.table: Any = weights
        self.pixels: PixelWeights | None = None
        if isinstance(weights, Tensor) and weights.ndim > 3:
            self.table, self.pixels = None, PixelWeights.of(weights)
            return
        if has_ranges(weights):
            for form in alternatives(weights):
                self._check(form)
            self.table = by_timestep(weights, torch.empty(0) if timesteps is None else timesteps)
        elif weights is not None and not callable(weights):
            self._check(weights)

    @property
    def change(self) -> bool:
        """Whether they are other ones in other steps."""
        return callable(self.table)

    def at(self, k: int, batch_size: int) -> Tensor:
        """Return those of step k, (B, M) float64 on the host."""
        weights = self.table(k) if callable(self.table) else self.table
        return preference_weights(weights, self._count, batch_size, extrapolate=self._extrapolate)

    def _check(self, weights: Any) -> None:  # noqa: ANN401 - `WeightsLike`
        shape = as_host_float64(weights, "weights").shape
        batch_size = shape[0] if len(shape) > 1 else 1
        preference_weights(weights, self._count, batch_size, extrapolate=self._extrapolate)


def count_of(count: int | None, levels: Levels | None, weights: WeightSchedule) -> int:
    """M, from whatever says it.

    Raises:
        InvalidShape: Nothing does.
    """
    if count is not None:
        return count
    if levels is not None:
        return len(levels.values)
    if weights is None or callable(weights):
        raise InvalidShape("how many objectives are there? Give count=, levels= or weights=")
    form: Any = alternatives(weights)[0] if has_ranges(weights) else weights
    shape = as_host_float64(form, "weights").shape
    return shape[1] if len(shape) > 3 else shape[-1]
