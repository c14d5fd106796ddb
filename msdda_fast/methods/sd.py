# SPDX-License-Identifier: Apache-2.0
"""SD: the base model alone, whatever the preference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from msdda_fast.methods.method import Method
from msdda_fast.methods.model import BASE, FusedModel

__all__ = ["SD"]


@dataclass(frozen=True, kw_only=True)
class SD(Method):
    """DDIM sampling of the base model.

    Args:
        eta: In [0, 1].
    """

    name: ClassVar[str] = "SD"
    eta: float = 1.0

    def sample(self, model: FusedModel) -> Tensor:
        """Draw images of the base model."""
        return model.decode(model.generate({BASE: 1.0}, {BASE: model.level(self.eta)}))
