# SPDX-License-Identifier: Apache-2.0
"""A system of the comparison: how it is called, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from msdda_fast.methods.model import Cost, LatentModel
from msdda_fast.rewards import Reward

if TYPE_CHECKING:
    from msdda_fast.pipelines import MSDDAPipeline

__all__ = ["Drawn", "Method"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a method drew.

    Attributes:
        images: (B, 3, H, W) float32 in [0, 1].
        cost: Of all B together.
    """

    images: Tensor
    cost: Cost


class Method(ABC):
    """One way to balance objectives; its settings are fields of the subclass.

    Attributes:
        name: In tables.
        needs_rewards: Whether sampling evaluates rewards.
    """

    name: ClassVar[str]
    needs_rewards: ClassVar[bool] = False

    @property
    def needs_gradients(self) -> bool:
        """Whether sampling differentiates the rewards that have weight."""
        return False

    @abstractmethod
    def sample(self, model: LatentModel) -> Tensor:
        """Draw images (B, 3, H, W) in [0, 1] for the preference of `model`."""

    def __call__(
        self,
        pipe: MSDDAPipeline,
        prompts: Sequence[str],
        weights: Mapping[str, float],
        seeds: Sequence[int],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        rewards: Mapping[str, Reward] | None = None,
    ) -> Drawn:
        """Draw one image per prompt and seed. The same (prompt, seed) has the same noise anywhere.

        Args:
            pipe: The base model, and the aligned ones as its objectives. It stays as it is.
            prompts: B texts.
            weights: Preference w, on the simplex: by objective, and by reward where rewards guide.
            seeds: B integers of 64 bits.
            num_inference_steps: T.
            guidance_scale: Of every model; None: the objectives' own.
            rewards: By the names in `weights`, for methods that evaluate them.

        Raises:
            UnknownObjective: A weight for what is neither an objective nor a reward.
            InvalidWeights: Weights off the simplex.
            InvalidShape: Not one seed per prompt.
            InvalidSchedule: A number of steps or guidance scale outside its range.
            ValueError: The method needs rewards, and none or not all are given; or it follows their
                gradients, and one with weight has none.
        """
        from msdda_fast.methods.pipeline_model import PipelineModel

        if self.needs_rewards and (missing := [n for n in weights if n not in (rewards or {})]):
            raise ValueError(f"{self.name} evaluates rewards, and has none for {missing}")
        if self.needs_gradients:
            for name, reward in (rewards or {}).items():
                if weights.get(name, 0.0) != 0 and not reward.differentiable:
                    raise ValueError(
                        f"{self.name} follows the gradients of rewards, and reward {name!r} has "
                        f"none: its `differentiable` is False"
                    )
        with (
            torch.no_grad(),
            PipelineModel(
                pipe,
                prompts,
                weights,
                seeds,
                num_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                rewards=rewards if self.needs_rewards else None,
            ) as model,
        ):
            images = self.sample(model)
        return Drawn(images.detach().float(), model.cost)
