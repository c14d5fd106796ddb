# SPDX-License-Identifier: Apache-2.0
"""The fused step inside a stock pipeline's loop: hidden predictions in, the loop's own dtype out.

Loops feed what `step` returns to networks and autoencoders as it is, so it must have the dtype that
the stock step would return. The state itself stays in float32: it is kept beside the tensor that
was handed out, and taken up again when the loop brings that very tensor back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape
from msdda_fast.levels import TimestepRange
from msdda_fast.pipelines.fusing import Fusing, FusingOptions
from msdda_fast.pipelines.hidden_axis import HiddenAxis
from msdda_fast.steps.pixels import PixelWeights
from msdda_fast.steps.strength import folding
from msdda_fast.torch_private import versions_of

__all__ = ["PipelineFusing", "WithBase"]


class WithBase(NamedTuple):
    """Strengths and timesteps of M objectives, as a mixture of predictions with the base's.

    A step's mean is affine in the prediction, so that the bracket of an objective and the base at
    one level (`steps.strength`) is a step with `base + s (own - base)`.

    Attributes:
        strength: (T or 1, B or 1, M) float64, no unit.
        ranges: The timesteps of each objective; None: all.
    """

    strength: Tensor
    ranges: Sequence[TimestepRange | None]

    @classmethod
    def of(
        cls, strength: Tensor | None, columns: list[int], ranges: list[TimestepRange | None]
    ) -> Self:
        """Return the strengths (B, M) or (T, B, M) of the objectives that run.

        Raises:
            InvalidWeights: A strength is negative or not finite.
        """
        if strength is None:
            strength = torch.ones(1, len(columns), dtype=torch.float64)
        else:
            strength = strength[..., columns]
        fold = folding(
            strength, None, torch.zeros(1 if strength.ndim < 3 else len(strength)), len(columns)
        )
        assert fold is not None
        return cls(fold.strength, ranges)

    def mixed(self, stacked: Tensor, timestep: Tensor | float, k: int) -> Tensor:
        """Return predictions (M, B, *S) of those and the base's, (M + 1, B, *S), at step k.

        Raises:
            InvalidShape: There are other strengths than one for each of the B images.
        """
        own, base = stacked[:-1], stacked[-1:]
        s = self.strength[k % len(self.strength)].T.clone()  # (M, B)
        if s.shape[1] not in (1, stacked.shape[1]):
            raise InvalidShape(
                f"strengths of {s.shape[1]} images, and the loop has {stacked.shape[1]} rows"
            )
        for m, given in enumerate(self.ranges):
            if given is not None and not given[0] <= float(timestep) <= given[1]:
                s[m] = 0.0
        s = s.to(own)[(..., *(None,) * (own.ndim - 2))]
        return torch.lerp(base.expand_as(own), own, s.expand_as(own))  # of 0 and 1 exact


class PipelineFusing(Fusing):
    """`Fusing` for a loop whose predictions have a hidden objective axis.

    Args:
        scheduler, options, settings: As there.
        pixels: Weights of every pixel of a state, or without one any that stand for them in checks;
            None: all pixels have those of the step.

    Attributes:
        steps: How many steps were fused since `begin`.
        last: The state after the last of them, in its own dtype; None: there was none.
        with_base: How far from the base objectives are in each step, and the base's predictions
            come behind theirs; None: they do not.
    """

    _handed_out: tuple[Tensor, int, Tensor] | None = None
    steps = 0
    last: Tensor | None = None
    with_base: WithBase | None = None

    def __init__(
        self,
        scheduler: Any,  # noqa: ANN401 - any scheduler of diffusers
        options: FusingOptions,
        *,
        pixels: Callable[[Tensor | None], PixelWeights] | None,
        **settings: Any,  # noqa: ANN401 - of `Fusing`
    ) -> None:
        self._of_pixels = pixels
        super().__init__(scheduler, options, **settings)

    def _pixels(self, sample: Tensor | None) -> PixelWeights | None:
        return None if self._of_pixels is None else self._of_pixels(sample)

    def begin(self, scheduler: Any) -> None:  # noqa: ANN401 - any scheduler of diffusers
        """Take up the timesteps of `scheduler`, if there are any."""
        super().begin(scheduler)
        self._handed_out, self.steps, self.last = None, 0, None

    def step(
        self,
        scheduler: Any,  # noqa: ANN401 - any scheduler of diffusers
        stock_step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401 - what the stock step returns
        """Do `stock_step(scheduler, *args, **kwargs)` with M hidden predictions for one.

        With one objective that brings no noise of its own it is the stock step to the bit.
        """
        self.steps += 1
        given = inspect.signature(stock_step).bind(scheduler, *args, **kwargs)
        values = given.arguments
        output, sample = values["model_output"], values["sample"]
        if self.count == 1 and self.is_stock and self.with_base is None:
            return stock_step(*given.args, **given.kwargs)
        for name, value in values.items():  # such as masks: objectives do not differ in them
            if isinstance(value, HiddenAxis):
                values[name] = value.stacked[0]
        if isinstance(output, HiddenAxis):
            stacked: Tensor = output.stacked
            if self.with_base is not None:
                stacked = self.with_base.mixed(stacked, values["timestep"], self.steps - 1)
            values["model_output"] = stacked
        else:  # no objective changes the network
            values["model_output"] = output.expand(self.count, *output.shape)
        values["sample"] = self._kept(sample)
        result = super().step(scheduler, stock_step, given.args[1:], given.kwargs)
        self.last = state = result[0] if isinstance(result, tuple) else result.prev_sample
        shown = state.to(output.dtype)
        if shown is not state:
            self._handed_out = (shown, versions_of([shown])[0], state)
        if isinstance(result, tuple):
            return (shown, *result[1:])
        result.prev_sample = shown
        return result

    def _kept(self, sample: Tensor) -> Tensor:
        """The state behind a tensor that was handed out and not changed since."""
        if self._handed_out is not None and not sample.is_inference():
            shown, version, state = self._handed_out
            if sample is shown and versions_of([sample]) == [version]:
                return state
        return sample
