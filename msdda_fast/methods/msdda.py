# SPDX-License-Identifier: Apache-2.0
"""MSDDA: the product of experts of the aligned models' reverse steps (Theorem 1, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from msdda_fast.methods.method import Method
from msdda_fast.methods.model import FusedModel, Fusion

__all__ = ["MSDDA"]


@dataclass(frozen=True, kw_only=True)
class MSDDA(Method):
    """Exact for Eq. (3), given exact single-objective optima over one base.

    Args:
        etas: In (0, 1], by objective; None: the objectives' own.
        fusion: "posterior" is Algorithm 1; "eps" mixes the predictions and steps at eta_w, which
            keeps the noise level of a step even if the etas differ.
    """

    name: ClassVar[str] = "MSDDA"
    etas: dict[str, float] | None = None
    fusion: Fusion = "posterior"

    def sample(self, model: FusedModel) -> Tensor:
        """Draw images from the fused reverse steps of the aligned models."""
        etas = model.etas if self.etas is None else self.etas
        return model.decode(model.generate(model.preference, etas, fusion=self.fusion))
