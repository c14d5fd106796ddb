# SPDX-License-Identifier: Apache-2.0
"""The fused step inside a stock pipeline's loop: hidden predictions in, the loop's own dtype out.

Loops feed what `step` returns to networks and autoencoders as it is, so it must have the dtype that
the stock step would return. The state itself stays in float32: it is kept beside the tensor that
was handed out, and taken up again when the loop brings that very tensor back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from msdda_fast.pipelines.fusing import Fusing
from msdda_fast.pipelines.hidden_axis import HiddenAxis
from msdda_fast.torch_private import versions_of

__all__ = ["PipelineFusing"]


class PipelineFusing(Fusing):
    """`Fusing` for a loop whose predictions have a hidden objective axis.

    Attributes:
        steps: How many steps were fused since `begin`.
    """

    _handed_out: tuple[Tensor, int, Tensor] | None = None
    steps = 0

    def begin(self, scheduler: Any) -> None:  # noqa: ANN401 - any scheduler of diffusers
        """Take up the timesteps of `scheduler`, if there are any."""
        super().begin(scheduler)
        self._handed_out, self.steps = None, 0

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
        if self.count == 1 and self.is_stock:
            return stock_step(*given.args, **given.kwargs)
        for name, value in values.items():  # such as masks: objectives do not differ in them
            if isinstance(value, HiddenAxis):
                values[name] = value.stacked[0]
        if isinstance(output, HiddenAxis):
            values["model_output"] = output.stacked
        else:  # no objective changes the network
            values["model_output"] = output.expand(self.count, *output.shape)
        values["sample"] = self._kept(sample)
        result = super().step(scheduler, stock_step, given.args[1:], given.kwargs)
        state = result[0] if isinstance(result, tuple) else result.prev_sample
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
