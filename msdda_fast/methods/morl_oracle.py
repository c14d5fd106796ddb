# SPDX-License-Identifier: Apache-2.0
"""The MORL oracle: a separate model for each preference, trained on r_w."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from msdda_fast.errors import InvalidWeights
from msdda_fast.levels import TimestepRange
from msdda_fast.methods.method import Method
from msdda_fast.methods.model import FusedModel

__all__ = ["MORLOracle"]

#: Preferences closer than this are the same.
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class MORLOracle(Method):
    """The adapter that was trained on `r_w = w r_1 + (1 - w) r_2` for exactly this w.

    Args:
        objective: Of the two objectives, the one that w is the weight of.
        adapters: Files, folders or hub ids of LoRA adapters, by w.
        timesteps: First and last timestep in which they act, the base elsewhere; None: all.
        eta: In [0, 1]; None: eta_w of the objectives' own etas, the noise of MSDDA.
    """

    name: ClassVar[str] = "MORL"
    objective: str
    adapters: Mapping[float, str | Path]
    timesteps: TimestepRange | None = None
    eta: float | None = None

    def sample(self, model: FusedModel) -> Tensor:
        """Draw images of the adapter that was trained for the preference.

        Raises:
            InvalidWeights: No adapter was trained for this preference.
            FileNotFoundError, AdapterMismatch, ValueError: See `FusedModel.load`.
        """
        adapter = self._adapter(model.preference)
        name = model.load(adapter, self.timesteps)
        return model.decode(model.generate({name: 1.0}, {name: model.level(self.eta)}))

    def _adapter(self, preference: Mapping[str, float]) -> str | Path:
        if self.objective not in preference or len(preference) != 2:
            raise InvalidWeights(
                f"adapters are for weights of {self.objective!r} and one other objective, got "
                f"{dict(preference)}"
            )
        w = preference[self.objective]
        for trained, path in self.adapters.items():
            if math.isclose(w, trained, abs_tol=_TOLERANCE):
                return path
        known = ", ".join(f"{trained:g}" for trained in sorted(self.adapters)) or "none"
        raise InvalidWeights(
            f"no adapter was trained for weight {w:g} of {self.objective!r}; known: {known}"
        )
