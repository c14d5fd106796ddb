# SPDX-License-Identifier: Apache-2.0
"""The kinds of noise that the guider offers, and the levels of its objectives."""

from __future__ import annotations

from collections.abc import Sequence

from msdda_fast.errors import InvalidSchedule
from msdda_fast.levels import CPS, DanceSDE, FlowDDIM, FlowNoise, FlowSDE

__all__ = ["NOISES", "levels_of"]

#: As the node shows them; None: Euler ancestral's eta, of flow models too.
NOISES: dict[str, type[FlowNoise] | None] = {
    "ancestral": None,
    "FlowSDE": FlowSDE,
    "DanceSDE": DanceSDE,
    "CPS": CPS,
    "FlowDDIM": FlowDDIM,
}


def levels_of(
    noise: str, levels: Sequence[float], *, ends_at_zero: bool
) -> Sequence[float] | Sequence[FlowNoise]:
    """Return levels as `sample_msdda` takes them.

    A step to sigma 0 adds no noise: what comes out is decoded, as from any sampler of ComfyUI.

    Raises:
        InvalidSchedule: An unknown kind, or a level outside of its range.
    """
    if noise not in NOISES:
        raise InvalidSchedule(f"noise is {noise!r}, expected one of {', '.join(NOISES)}")
    kind = NOISES[noise]
    if kind is None:
        return list(levels)
    return [kind(level, last_step=not ends_at_zero) for level in levels]
