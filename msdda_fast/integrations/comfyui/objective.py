# SPDX-License-Identifier: Apache-2.0
"""An objective in ComfyUI: a model and what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["ComfyObjective"]


@dataclass(frozen=True, slots=True)
class ComfyObjective:
    """One model of a fused run.

    Attributes:
        model: comfy's ModelPatcher.
        positive, negative: CONDITIONING, as CLIPTextEncode makes it; negative may be None at cfg 1.
        cfg: Guidance scale; 1 leaves the negative out.
        weight: >= 0, relative to the others' of those without a mask; 0: it takes no part.
        eta: Noise level, >= 0, in the unit of the guider's noise.
        mask: MASK, (1 or B, H, W) in [0, 1], its weight at each pixel; None: no mask.
        start_percent, end_percent: Where it acts, in [0, 1] of the sampling schedule.
    """

    model: Any
    positive: list[Any]
    negative: list[Any] | None
    cfg: float
    weight: float
    eta: float
    mask: Tensor | None = None
    start_percent: float = 0.0
    end_percent: float = 1.0

    @property
    def model_sampling(self) -> Any:  # noqa: ANN401 - comfy's
        """What its sigmas mean."""
        return self.model.get_model_object("model_sampling")

    def acts(self, sigmas: Tensor) -> Tensor:
        """Whether it acts in steps that begin at sigmas (T,), both ends included; (T,) bool."""
        sampling = self.model_sampling
        last = float(sampling.percent_to_sigma(self.end_percent))
        inside_range = sigmas >= last
        if self.start_percent > 0:
            inside_range &= sigmas <= float(sampling.percent_to_sigma(self.start_percent))
        return inside_range & torch.tensor(self.weight > 0, device=sigmas.device)
