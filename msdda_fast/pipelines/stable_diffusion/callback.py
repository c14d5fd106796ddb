# SPDX-License-Identifier: Apache-2.0
"""diffusers' `callback_on_step_end`, between the steps of a generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, InvalidShape
from msdda_fast.pipelines.stable_diffusion.sampling import PromptedGeneration
from msdda_fast.steps.coefficients import CoefficientTable

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
    def check(cls, function: StepCallback | None, names: Sequence[str] | None) -> Callback | None:
        """Check diffusers' two callback arguments; its callback objects carry their own names.

        Raises:
            ValueError: A name is not one of `CALLBACK_TENSORS`.
        """
        if isinstance(function, (PipelineCallback, MultiPipelineCallbacks)):
            names = function.tensor_inputs
        for name in names or ():
            if name not in CALLBACK_TENSORS:
                raise ValueError(
                    f"callback_on_step_end_tensor_inputs: {name!r} is not one of "
                    f"{', '.join(CALLBACK_TENSORS)}"
                )
        if function is not None and not callable(function):
            raise ValueError(f"callback_on_step_end must be callable, got {function!r:.80}")
        return None if function is None else cls(function, names or ())

    def __call__(
        self,
        pipe: Any,  # noqa: ANN401 - what the caller called, handed through
        k: int,
        table: CoefficientTable,
        generation: PromptedGeneration,
        embeds: Tensor,
    ) -> None:
        """Call the function with the state after step k, and continue with what it returns.

        As in diffusers, it may set `pipe._guidance_scale` for the steps that follow.
        """
        embeds = embeds if self._embeds is None else self._embeds
        guidance = pipe._guidance_scale
        # the state may be a buffer that the next step overwrites
        x, cond = generation.x.clone(), embeds[:, -1]
        uncond = embeds[:, 0] if embeds.shape[1] == 2 else None
        values: dict[str, Any] = dict(zip(CALLBACK_TENSORS, (x, cond, uncond), strict=True))
        t = table.timesteps[k]
        given = self.function(pipe, k, t, {name: values[name] for name in self.names}) or {}
        _check_returned(given)
        if (new_x := given.get("latents", x)) is not x:
            if new_x.shape != x.shape:
                raise InvalidShape(_message("latents", new_x, [tuple(x.shape)]))
        generation.replace_x(new_x.to(x))
        new_cond = given.get("prompt_embeds", cond)
        if uncond is not None and new_cond.shape == (2 * cond.shape[1], *cond.shape[2:]):
            uncond, new_cond = (half.expand_as(cond) for half in new_cond.chunk(2))
        cond = _embeds("prompt_embeds", new_cond, cond)
        if uncond is not None:
            uncond = _embeds(
                "negative_prompt_embeds", given.get("negative_prompt_embeds", uncond), uncond
            )
        self._embeds = torch.stack([cond] if uncond is None else [uncond, cond], dim=1)
        generation.replace_prompt(self._embeds)
        if pipe._guidance_scale != guidance:
            scale = max(1.0, float(pipe._guidance_scale))  # in diffusers, 1 and less is none
            if scale > 1 and uncond is None:
                raise InvalidSchedule(
                    f"a callback set the guidance scale to {scale:g}, but this call began without "
                    "guidance (1), so there are no negative prompts to steer away from"
                )
            generation.replace_table(table.guided(scale))


def _check_returned(given: object) -> None:
    """Check that a callback returned None or tensors by name."""
    if not isinstance(given, Mapping):
        raise InvalidShape(f"a callback returned {given!r:.80}, expected None or tensors by name")
    for name in CALLBACK_TENSORS:
        if not isinstance(given.get(name, torch.empty(0)), Tensor):
            raise InvalidShape(f"a callback returned {name} {given[name]!r:.80}, expected a tensor")


def _embeds(name: str, new: Tensor, own: Tensor) -> Tensor:
    """Returned embeddings as (M, B, L, D), the shape of `own`.

    diffusers' callbacks take `[-1:]` or the last half of them, where stock pipelines keep the
    prompts behind the negative ones: such a part of `own` stands for `own`.
    """
    if new.shape == own.shape:
        return new
    if new.shape[1:] == own.shape[1:] and torch.equal(new, own[-len(new) :]):
        return own
    if new.shape in (own.shape[1:], (1, *own.shape[1:])):
        return new.expand_as(own)
    raise InvalidShape(_message(name, new, [tuple(own.shape), tuple(own.shape[1:])]))


def _message(name: str, new: Tensor, expected: list[tuple[int, ...]]) -> str:
    shapes = " or ".join(map(str, expected))
    return f"a callback returned {name} of shape {tuple(new.shape)}, expected {shapes}"
