# SPDX-License-Identifier: Apache-2.0
"""DB-MPA (Diffusion Blend): one DDIM step of the averaged noise predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from msdda_fast.methods.method import Method
from msdda_fast.methods.model import FusedModel, Level

__all__ = ["DBMPA"]


@dataclass(frozen=True, kw_only=True)
class DBMPA(Method):
    """`eps = sum_i w_i eps_i`, then one DDIM step at an eta that all models share.

    If all aligned models have the same eta, and this one is equal to it, this is MSDDA. If their
    etas differ, the remapped version tends to MSDDA as T -> infinity; see `effective_weights`.

    Args:
        eta: In [0, 1]; None: 1, or eta_w if remapped.
        remapped: Use the effective weights and eta_w of the objectives' own etas.

    Raises:
        ValueError: An eta is given although `remapped` sets it.
    """

    name: ClassVar[str] = "DB-MPA"
    eta: float | None = None
    remapped: bool = False

    def __post_init__(self) -> None:
        if self.remapped and self.eta is not None:
            raise ValueError(f"the remapped DB-MPA steps at eta_w, got eta={self.eta!r} as well")

    def sample(self, model: FusedModel) -> Tensor:
        """Draw images by DDIM steps of the averaged noise predictions."""
        weights, eta = self._setting(model)
        x_0 = model.generate(weights, dict.fromkeys(weights, eta), fusion="eps")
        return model.decode(x_0)

    def _setting(self, model: FusedModel) -> tuple[Mapping[str, float], Level]:
        if self.remapped:
            return model.remapped()
        return model.preference, model.level(1.0 if self.eta is None else self.eta)
