# SPDX-License-Identifier: Apache-2.0
"""diffusers' `callback_on_step_end`, between the steps of a generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from msdda_fast.pipelines.stable_diffusion.sampling import PromptedGeneration

__all__ = ["Callback", "StepCallback"]

#: `f(pipe, k, t, tensors)` after step k, returning the tensors that it replaces.
StepCallback: TypeAlias = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


@dataclass(slots=True)
class Callback:
    """The function called after each step, and the names of the tensors it gets."""

    function: StepCallback
    names: Sequence[str]
    _embeds: Tensor | None = None  # (M, K, B, L, D), as it was last replaced

    @classmethod
    def check(cls, function: StepCallback | None, names: Sequence[str]) -> Callback | None:
        """Check diffusers' two callback arguments; its callback objects carry their own names.

        Raises:
            ValueError: A name is not one of `CALLBACK_TENSORS`.
        """
        if isinstance(function, (PipelineCallback, MultiPipelineCallbacks)):
            names = function.tensor_inputs
        for name in names:
            if name not in CALLBACK_TENSORS:
                raise ValueError(
                    f"callback_on_step_end_tensor_inputs: {name!r} is not one of "
                    f"{', '.join(CALLBACK_TENSORS)}"
                )
        return None if function is None else cls(function, names)

    def __call__(
        self,
        pipe: Any,  # noqa: ANN401 - what the caller called, handed through
        k: int,
        t: Tensor,
        generation: PromptedGeneration,
        embeds: Tensor,
    ) -> None:
        """Call the function with the state after step k, and continue with what it returns."""
        embeds = embeds if self._embeds is None else self._embeds
        # the state may be a buffer that the next step overwrites
        x, cond = generation.x.clone(), embeds[:, -1]
        uncond = embeds[:, 0] if embeds.shape[1] == 2 else None
        values: dict[str, Any] = dict(zip(CALLBACK_TENSORS, (x, cond, uncond), strict=True))
        given = self.function(pipe, k, t, {name: values[name] for name in self.names}) or {}
        values.update(given)
        new_x, cond, uncond = (values[name] for name in CALLBACK_TENSORS)
        generation.replace_x(new_x.to(x))
        self._embeds = torch.stack([cond] if uncond is None else [uncond, cond], dim=1)
        generation.replace_prompt(self._embeds)
