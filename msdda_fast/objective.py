# SPDX-License-Identifier: Apache-2.0
"""Objectives: aligned models, each with the noise that it was aligned with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from msdda_fast.errors import InvalidSchedule
from msdda_fast.levels import ETA, FlowNoise, TimestepRange, check_range

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
        timesteps: First and last timestep, both included, in which the objective acts, such as
            (500, 999); the base stands in for it in others. None: in all.
        scale: Factor on the adapter's update, no unit; 1 is the adapter as trained. One per source,
            or one for all.
        weight_name: File name inside `source` when it is a folder or hub id.
        subfolder: Folder inside `source`.
        guidance_scale: Classifier-free guidance of this objective; None: the scale of the call.
        unet: A full network in place of base and adapter.

    Raises:
        InvalidSchedule: `eta` outside [0, 1], noise of an unknown kind, a range without timesteps,
            or a guidance scale that is not finite.
        ValueError: `scale` is not finite or not one per source, both `source` and `unet` are given,
            or a name of a file is none.
    """

    source: str | Path | Sequence[str | Path] | None = None
    _: KW_ONLY
    eta: float = 1.0
    noise: FlowNoise | None = None
    timesteps: TimestepRange | None = None
    scale: float | Sequence[float] = 1.0
    weight_name: str | None = None
    subfolder: str | None = None
    guidance_scale: float | None = None
    unet: Any = None  # a torch.nn.Module; Any because level 0 knows no networks

    def __post_init__(self) -> None:
        ETA.check_one(self.eta, "Objective")
        self._set("eta", float(self.eta))
        if isinstance(self.source, list):  # equal whatever kind of list was given
            self._set("source", tuple(self.source))
        self._check_places()
        if self.noise is not None and not isinstance(self.noise, FlowNoise):
            raise InvalidSchedule(
                f"Objective: noise must be None or noise of flow models, such as FlowSDE(0.7), got "
                f"{self.noise!r}; DDIM's level is eta"
            )
        if self.timesteps is not None:
            self._set("timesteps", check_range(self.timesteps))
        given: Any = self.scale.tolist() if hasattr(self.scale, "tolist") else self.scale
        several = isinstance(given, (list, tuple))
        scales = tuple(_finite(scale) for scale in (given if several else [given]))
        if None in scales:
            raise ValueError(f"Objective: scale must be finite, got {self.scale!r:.80}")
        self._set("scale", scales if several else scales[0])
        if isinstance(self.scale, Sequence) and len(self.scale) != len(self.sources):
            raise ValueError(f"Objective: {len(self.scale)} scales for {len(self.sources)} sources")
        if self.guidance_scale is not None:
            guidance = _finite(self.guidance_scale)
            if guidance is None:
                raise InvalidSchedule(
                    f"Objective: guidance_scale must be finite, got {self.guidance_scale!r:.80}"
                )
            self._set("guidance_scale", guidance)
        if self.source is not None and self.unet is not None:
            raise ValueError(
                f"Objective: give source (an adapter) or unet (a full network), not both; "
                f"got source={str(self.source)!r} and a unet"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen

    def _check_places(self) -> None:
        """Check what names a file: an empty name would be the current folder or the base."""
        places = self.source if isinstance(self.source, tuple) else (self.source,)
        for place in places:
            empty = self.source is not None and place is None
            if empty or not isinstance(place, (str, Path, type(None))) or place == "":
                raise ValueError(
                    "Objective: source must be a file, folder or hub id, or several, got "
                    f"{self.source!r:.80}"
                )
        if not places:
            raise ValueError("Objective: source is an empty list; the base is Objective.base()")
        for name in ("weight_name", "subfolder"):
            if not isinstance(value := getattr(self, name), (str, Path, type(None))):
                raise ValueError(f"Objective: {name} must be a text, got {value!r:.80}")

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


def _finite(value: Any) -> float | None:  # noqa: ANN401 - what it is, is the question
    """Return a number of Python, numpy or torch as a `float`; None: it is none, or not finite."""
    try:
        number = float(value) if not isinstance(value, (str, bytes)) else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
