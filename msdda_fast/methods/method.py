# SPDX-License-Identifier: Apache-2.0
"""A system of the comparison: how it is called, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.methods.model import Cost, LatentModel
from msdda_fast.rewards import Reward

if TYPE_CHECKING:
    from msdda_fast.pipelines import MSDDAPipeline
    from msdda_fast.pipelines.attach import WithObjectives

__all__ = ["Drawn", "Method", "Pipeline", "is_stock", "needs_captured"]

#: Stable Diffusion's, or of any family.
Pipeline: TypeAlias = "MSDDAPipeline | WithObjectives"


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a method drew.

    Attributes:
        images: (B, 3, H, W) float32 in [0, 1].
        cost: The cost of all B images together.
    """

    images: Tensor
    cost: Cost


class Method(ABC):
    """One way to balance objectives; its settings are fields of the subclass.

    Attributes:
        name: Its name in tables.
        needs_rewards: Whether sampling evaluates rewards.
    """

    name: ClassVar[str]
    needs_rewards: ClassVar[bool] = False

    @property
    def needs_gradients(self) -> bool:
        """Whether sampling differentiates the rewards whose weight is not 0."""
        return False

    @abstractmethod
    def sample(self, model: LatentModel) -> Tensor:
        """Draw images (B, 3, H, W) in [0, 1] for the preference of `model`."""

    def __call__(
        self,
        pipe: Pipeline,
        prompts: Sequence[str],
        weights: Mapping[str, float],
        seeds: Sequence[int],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        rewards: Mapping[str, Reward] | None = None,
    ) -> Drawn:
        """Draw one image per prompt and seed. A (prompt, seed) has the same noise in all methods.

        Args:
            pipe: The base model, with the aligned models as its objectives; not modified. Of any
                family for systems that evaluate no rewards.
            prompts: B texts.
            weights: Preference w, on the simplex: by objective, or by reward if rewards guide.
            seeds: B integers of 64 bits.
            num_inference_steps: T.
            guidance_scale: The scale of every model; None: the objectives' own, or the default of a
                pipeline's call.
            rewards: By the names in `weights`, for methods that evaluate them.

        Raises:
            UnknownObjective: A weight names neither an objective nor a reward.
            InvalidWeights: The weights are not on the simplex.
            InvalidShape: There is not one seed per prompt.
            InvalidSchedule: The number of steps or the guidance scale is out of range.
            UnsupportedNetwork: The method evaluates rewards, and the pipeline is not Stable
                Diffusion's; or a pipeline of another family draws no images from prompts.
            ValueError: The method needs rewards and some are missing; or it follows their
                gradients, and a reward with weight has none.
        """
        if self.needs_rewards and is_stock(pipe):
            raise UnsupportedNetwork(f"{self.name} {needs_captured(pipe)}")
        if self.needs_rewards and (missing := [n for n in weights if n not in (rewards or {})]):
            raise ValueError(f"{self.name} evaluates rewards, and none is given for {missing}")
        if self.needs_gradients:
            for name, reward in (rewards or {}).items():
                if weights.get(name, 0.0) != 0 and not reward.differentiable:
                    raise ValueError(
                        f"{self.name} follows the gradients of rewards, and reward {name!r} has "
                        f"none: its `differentiable` is False"
                    )
        with (
            torch.no_grad(),
            _model(
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


def is_stock(pipe: Pipeline) -> bool:
    """Whether a pipeline is of a family whose loop is its own."""
    from msdda_fast.pipelines.attach import WithObjectives

    return isinstance(pipe, WithObjectives)


def needs_captured(pipe: Pipeline) -> str:
    """Return the sentence that refuses a system or an option, but for its first word, the name."""
    return (
        "needs single steps of the networks, which Stable Diffusion's captured pipeline gives, and "
        f"{type(pipe).__name__} does not"
    )


def _model(pipe: Any, *args: Any, rewards: Any, **settings: Any) -> Any:  # noqa: ANN401
    if is_stock(pipe):
        from msdda_fast.methods.stock_model import StockModel

        return StockModel(pipe, *args, **settings)
    from msdda_fast.methods.pipeline_model import PipelineModel

    return PipelineModel(pipe, *args, rewards=rewards, **settings)
