# SPDX-License-Identifier: Apache-2.0
"""Objectives: aligned models, each with the noise that it was aligned with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from msdda_fast.errors import InvalidSchedule
from msdda_fast.levels import ETA, FlowNoise

__all__ = ["Objective"]


@dataclass(frozen=True, slots=True)
class Objective:
    """One aligned model `p_i(x_{t-1} | x_t) = N(mu_i, eta_i^2 v_t I)`.

    Args:
        source: LoRA file, folder or hub id, or several that act together (an accelerator and a
            preference, say). None, with no `unet`: the base model itself.
        eta: DDIM stochasticity the model was aligned with, in [0, 1]; 1 is DDPM, 0 deterministic.
        noise: Instead, for flow models: what it was aligned with, such as `FlowSDE(0.7)`. None: it
            has no noise of its own, and takes that of the others.
        scale: Factor on the adapter's update, no unit; 1 is the adapter as trained. One per source,
            or one for all.
        weight_name: File name inside `source` when it is a folder or hub id.
        subfolder: Folder inside `source`.
        guidance_scale: Classifier-free guidance of this objective; None: the scale of the call.
        unet: A full network in place of base and adapter.

    Raises:
        InvalidSchedule: `eta` outside [0, 1], noise of an unknown kind, or a guidance scale that is
            not finite.
        ValueError: `scale` is not finite or not one per source, or both `source` and `unet` are
            given.
    """

    source: str | Path | Sequence[str | Path] | None = None
    _: KW_ONLY
    eta: float = 1.0
    noise: FlowNoise | None = None
    scale: float | Sequence[float] = 1.0
    weight_name: str | None = None
    subfolder: str | None = None
    guidance_scale: float | None = None
    unet: Any = None  # a torch.nn.Module; Any because level 0 knows no networks

    def __post_init__(self) -> None:
        ETA.check_one(self.eta, "Objective")
        for name in ("source", "scale"):  # frozen, and equal whatever kind of list was given
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if self.noise is not None and not isinstance(self.noise, FlowNoise):
            raise InvalidSchedule(
                f"Objective: noise must be None or noise of flow models, such as FlowSDE(0.7), got "
                f"{self.noise!r}; DDIM's level is eta"
            )
        scales = self.scale if isinstance(self.scale, Sequence) else (self.scale,)
        if not all(math.isfinite(scale) for scale in scales):
            raise ValueError(f"Objective: scale must be finite, got {self.scale!r}")
        if isinstance(self.scale, Sequence) and len(self.scale) != len(self.sources):
            raise ValueError(f"Objective: {len(self.scale)} scales for {len(self.sources)} sources")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise InvalidSchedule(
                f"Objective: guidance_scale must be finite, got {self.guidance_scale!r}"
            )
        if self.source is not None and self.unet is not None:
            raise ValueError(
                f"Objective: give source (an adapter) or unet (a full network), not both; "
                f"got source={str(self.source)!r} and a unet"
            )

    @classmethod
    def base(cls, eta: float = 1.0) -> Objective:
        """Return the base model as an objective; `eta` in [0, 1]."""
        return cls(eta=eta)

    @property
    def sources(self) -> tuple[str | Path, ...]:
        """The adapters that act together, in order; none for the base and for full networks."""
        if self.source is None:
            return ()
        return (self.source,) if isinstance(self.source, (str, Path)) else tuple(self.source)

    @property
    def scales(self) -> tuple[float, ...]:
        """One scale per source."""
        if isinstance(self.scale, Sequence):
            return tuple(self.scale)
        return (self.scale,) * len(self.sources)

    @property
    def is_base(self) -> bool:
        """Whether this is the base model itself."""
        return self.source is None and self.unet is None
