# SPDX-License-Identifier: Apache-2.0
"""Noise levels: of which kinds there are, in which ranges, and how an objective says its own.

A sampler of the DDIM kind has one sort of level, eta, which is a number. Flow models are trained
with several, and .7 of one is not .7 of another; so each has a class: `FlowSDE(0.7)`. Where they
differ is told in `steps.flow_sde`, `steps.cps` and `steps.flow`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, InvalidShape
from msdda_fast.weights import as_host_float64

__all__ = [
    "CPS",
    "ETA",
    "DanceSDE",
    "FlowDDIM",
    "FlowNoise",
    "FlowSDE",
    "LevelRange",
    "Levels",
    "NoiseLevels",
    "TimestepRange",
    "check_range",
    "noise_from_json",
    "noise_to_json",
    "read_levels",
]


#: First and last timestep, both included, on the training grid.
TimestepRange = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelRange:
    """What the noise levels of a rule mean, and which there are.

    Attributes:
        name: What a level is called, such as "eta".
        meaning: Whose quantity that is, for the message of an error.
        low, high: The closed range, no unit; high may be infinite, a level may not.
    """

    name: str
    meaning: str
    low: float
    high: float

    def check_one(self, level: float, owner: str) -> None:
        """Raise `InvalidSchedule` unless `level` is in the range; `owner` starts the message."""
        try:
            if self.low <= level <= self.high and level < math.inf:  # false for NaN too
                return
        except TypeError:  # no number: told below
            pass
        if self.low == self.high:
            raise InvalidSchedule(
                f"{owner}: {self.name} is {self.meaning}, and got {level!r}: leave it out"
            )
        end = "inf)" if self.high == math.inf else f"{self.high:g}]"
        raise InvalidSchedule(
            f"{owner}: {self.name} must lie in [{self.low:g}, {end}, got {level!r}; {self.name} is "
            f"{self.meaning}, and a level of another kind of sampler is another quantity"
        )

    def check(self, levels: Sequence[float] | Tensor) -> Tensor:
        """Return the levels of M objectives as float64 on the host, (M,) with M >= 1.

        Raises:
            InvalidShape: Not (M,).
            InvalidSchedule: A level outside the range, probably one of another kind of sampler.
        """
        values = as_host_float64(levels, f"{self.name}s")
        if values.ndim != 1 or not len(values):
            raise InvalidShape(
                f"{self.name}s have shape {tuple(values.shape)}, expected (M,) with M >= 1"
            )
        for index, value in enumerate(values.tolist()):
            self.check_one(value, f"objective {index}")
        return values


#: 0 is deterministic, 1 is DDPM; beyond, sqrt(1 - alpha_bar_prev - tau^2) need not exist.
ETA = LevelRange(name="eta", meaning="DDIM's stochasticity", low=0.0, high=1.0)


@dataclass(frozen=True, slots=True)
class FlowNoise:
    """The noise that a flow model is sampled with; use one of the classes below.

    Args:
        level: How much, no unit; 0 is the ODE.
        window: (start, stop): noise in the steps start <= k < stop alone, counted from 0 in
            sampling order; None: in all. Outside, all objectives take the ODE's step, and their
            shares are the weights.
        last_step: Whether there is noise in the last step; without, it is the ODE's.

    Raises:
        InvalidSchedule: A level or a window outside of its range.
    """

    level: float
    _: KW_ONLY
    window: tuple[int, int] | None = None
    last_step: bool = True

    levels: ClassVar[LevelRange]

    def __post_init__(self) -> None:
        name = type(self).__name__
        self.levels.check_one(self.level, name)
        if not isinstance(self.last_step, bool):
            raise InvalidSchedule(
                f"{name}: last_step must be true or false, got {self.last_step!r}"
            )
        if self.window is not None and not _is_window(self.window):
            raise InvalidSchedule(
                f"{name}: window must be None or (start, stop) with 0 <= start < stop, got "
                f"{self.window!r}"
            )

    def noisy_steps(self, num_steps: int) -> Tensor:
        """Return which of T = `num_steps` steps add noise, (T,) float64 of ones and zeros.

        Raises:
            InvalidSchedule: The window ends after step T.
        """
        noisy = torch.ones(num_steps, dtype=torch.float64)
        if self.window is not None:
            start, stop = self.window
            if stop > num_steps:
                raise InvalidSchedule(
                    f"{type(self).__name__}: window {self.window} ends after the last of "
                    f"{num_steps} steps"
                )
            noisy[:start] = noisy[stop:] = 0.0
        if not self.last_step:
            noisy[-1] = 0.0
        return noisy


@dataclass(frozen=True, slots=True)
class FlowSDE(FlowNoise):
    """Flow-GRPO's SDE, a >= 0 (2505.05470; .7 is common); see `steps.flow_sde`.

    Args:
        sigma_max: In (0, 1): what t is taken for in the denominator of t / (1 - t) at t = 1. None:
            the sigma after it, as in Flow-GRPO; other trainers take .99.
    """

    sigma_max: float | None = None

    levels: ClassVar[LevelRange] = LevelRange(
        name="a", meaning="the noise level of Flow-GRPO's SDE", low=0.0, high=math.inf
    )

    def __post_init__(self) -> None:
        FlowNoise.__post_init__(self)  # slots: dataclass makes a new class, and super() has the old
        inside = isinstance(self.sigma_max, (int, float)) and 0.0 < self.sigma_max < 1.0
        if self.sigma_max is not None and not inside:
            raise InvalidSchedule(
                f"FlowSDE: sigma_max must be None or lie in (0, 1), got {self.sigma_max!r}"
            )


@dataclass(frozen=True, slots=True)
class DanceSDE(FlowNoise):
    """DanceGRPO's SDE, eta >= 0 (2505.07818; .3 is common); see `steps.flow_sde`."""

    levels: ClassVar[LevelRange] = LevelRange(
        name="eta", meaning="the noise level of DanceGRPO's SDE", low=0.0, high=math.inf
    )


@dataclass(frozen=True, slots=True)
class CPS(FlowNoise):
    """Coefficients-preserving sampling, a in [0, 1] (2509.05952); see `steps.cps`."""

    levels: ClassVar[LevelRange] = LevelRange(
        name="a", meaning="the noise level of CPS", low=0.0, high=1.0
    )


@dataclass(frozen=True, slots=True)
class FlowDDIM(FlowNoise):
    """DDIM's eta in [0, 1] for alpha = 1 - sigma; see `steps.flow`."""

    levels: ClassVar[LevelRange] = ETA


#: Levels of M objectives: numbers of the scheduler's own kind, or noise of flow models.
NoiseLevels = Sequence[float] | Sequence[FlowNoise] | Tensor


class Levels(NamedTuple):
    """The levels of M objectives, and their kind.

    Attributes:
        values: (M,) float64 on the host, not checked yet: a rule has its own range.
        noise: What all have in common; its own level says nothing. None: numbers were given.
    """

    values: Tensor
    noise: FlowNoise | None


def read_levels(levels: NoiseLevels) -> Levels:
    """Tell numbers from noise of flow models.

    Raises:
        InvalidSchedule: Objectives differ in more than their level.
        InvalidShape: Something else than numbers.
    """
    if isinstance(levels, FlowNoise):
        raise InvalidShape(f"levels are {levels!r}, expected a list of M, one for each objective")
    given = list(levels) if isinstance(levels, Sequence) else []
    if not any(isinstance(level, FlowNoise) for level in given):
        return Levels(as_host_float64(levels, "levels"), None)
    noises = [level for level in given if isinstance(level, FlowNoise)]
    common = replace(noises[0], level=0.0)
    for index, level in enumerate(given):
        if not isinstance(level, FlowNoise) or replace(level, level=0.0) != common:
            raise InvalidSchedule(
                f"objective {index} has the level {level!r}, and another has {noises[0]!r}: fused "
                f"steps are of one kind, and objectives may differ in the level alone"
            )
    values = torch.tensor([noise.level for noise in noises], dtype=torch.float64)
    return Levels(values, common)


_KINDS: dict[str, type[FlowNoise]] = {
    kind.__name__: kind for kind in (FlowSDE, DanceSDE, CPS, FlowDDIM)
}


def noise_to_json(noise: FlowNoise) -> dict[str, Any]:
    """Return `{"kind": "FlowSDE", "level": 0.7}`, and what else differs from the default."""
    given = {
        field.name: getattr(noise, field.name)
        for field in fields(noise)
        if getattr(noise, field.name) != field.default
    }
    return {"kind": type(noise).__name__, **given}


def noise_from_json(entry: Mapping[str, Any]) -> FlowNoise:
    """Return the noise that `noise_to_json` wrote.

    Raises:
        InvalidSchedule: A kind or a setting that does not exist, or is outside its range.
    """
    settings = dict(entry)
    kind = _KINDS.get(str(settings.pop("kind", None)))
    known = [] if kind is None else [field.name for field in fields(kind)]
    if kind is None or "level" not in settings or set(settings) - set(known):
        raise InvalidSchedule(
            f"noise {dict(entry)} is none of {', '.join(_KINDS)} with a level and its settings"
        )
    if isinstance(window := settings.get("window"), list):
        settings["window"] = tuple(window)
    return kind(**settings)


def _is_window(window: object) -> bool:
    return (
        isinstance(window, tuple)
        and len(window) == 2
        and all(isinstance(k, int) and not isinstance(k, bool) for k in window)
        and 0 <= window[0] < window[1]
    )


def check_range(given: Any) -> TimestepRange:  # noqa: ANN401 - what it is, is the question
    """Return (first, last), both included.

    Raises:
        InvalidSchedule: It is not two finite numbers in ascending order.
    """
    try:
        first, last = (float(value) for value in given)
    except (TypeError, ValueError):
        first, last = 1.0, 0.0
    if not 0 <= first <= last < float("inf"):
        raise InvalidSchedule(
            f"timesteps must be (first, last) with 0 <= first <= last, such as (500, 999), got "
            f"{given!r:.80}"
        )
    return first, last
