# SPDX-License-Identifier: Apache-2.0
"""How many images a call of a stock pipeline will draw, and in how many steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msdda_fast.engine.noise import image_seeds
from msdda_fast.pipelines.request import check_steps
from msdda_fast.types import WeightSchedule
from msdda_fast.weights import preference_schedule

__all__ = ["Batch"]

#: The first of these that is given says how many prompts there are: texts, what encoders made of
#: them (some pipelines name each encoder, as in `prompt_embeds_t5`), or what stands in their place.
_TEXTS = ("prompt", "prompt_embeds")
_OTHERS = ("image_embeds", "image", "class_labels")
_COPIES = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


@dataclass(frozen=True, slots=True)
class Batch:
    """The size of a call.

    Attributes:
        prompts: P.
        copies: Images of each prompt, consecutive.
        num_steps: T, an upper bound: image-to-image skips the first steps.
        takes_generator: Whether the pipeline has a `generator` argument.
        given: All arguments of the call by name, defaults included.
    """

    prompts: int
    copies: int
    num_steps: int
    takes_generator: bool
    given: Mapping[str, Any]

    @classmethod
    def of(cls, stock: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Batch:
        """Read the size off the arguments of a stock pipeline's call.

        Raises:
            TypeError: Arguments that the stock pipeline does not have.
            InvalidSchedule: `num_inference_steps` is not a positive integer.
        """
        signature = inspect.signature(stock)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        prompts = given.get("batch_size") or 1
        encoded = [name for name in given if name.startswith("prompt_embeds_")]
        for name in (*_TEXTS, *encoded, *_OTHERS):
            if (value := given.get(name)) is not None:
                prompts = len(value) if isinstance(value, (list, tuple, Tensor)) else 1
                break
        steps = given.get("num_inference_steps")
        steps = 1 if steps is None else check_steps(steps)
        for name in ("timesteps", "sigmas"):
            if given.get(name) is not None:
                steps = len(given[name])
        copies = next((given[name] for name in _COPIES if given.get(name) is not None), 1)
        return cls(prompts, copies, steps, "generator" in signature.parameters, given)

    @property
    def images(self) -> int:
        """B = P x copies."""
        return self.prompts * self.copies

    def weights(
        self, weights: WeightSchedule, objectives: Sequence[str], *, extrapolate: bool
    ) -> Tensor:
        """Return the preference weights of every step, (T, B, M) float64 on the host.

        Raises:
            InvalidShape, InvalidWeights, UnknownObjective: See `preference_schedule`.
        """
        return preference_schedule(
            weights,
            objectives,
            self.images,
            self.num_steps,
            images_per_prompt=self.copies,
            extrapolate=extrapolate,
        )

    def seeded(
        self, seed: int | Sequence[int] | None, kwargs: Mapping[str, Any]
    ) -> tuple[list[int] | None, dict[str, Any]]:
        """Return one seed per image, and the arguments with a generator for the x_T of each.

        Raises:
            InvalidShape: Not one seed per image.
            ValueError: `generator` is given, too, or the pipeline has no such argument.
        """
        if seed is None:
            return None, dict(kwargs)
        if kwargs.get("generator") is not None:
            raise ValueError("give seed or generator, not both")
        if not self.takes_generator:
            raise ValueError("this pipeline takes no generator, so x_T cannot follow from a seed")
        seeds = image_seeds(seed, self.images)
        # of the host on purpose: they draw the same on every device
        generators = [torch.Generator().manual_seed(number) for number in seeds]
        one = len(generators) == 1
        return seeds, {**kwargs, "generator": generators[0] if one else generators}
