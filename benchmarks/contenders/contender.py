# SPDX-License-Identifier: Apache-2.0
"""What a contender is, and how it is checked before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.contenders.request import Request

__all__ = ["LIMITS", "Contender", "Impossible", "Unverified", "effect", "verify"]

#: Largest accepted ||x - exact|| / ||exact|| after one step, by the dtype of the networks. That of
#: bfloat16 is eight times that of float16, as its rounding is: stock diffusers needs 1.6e-2 there.
LIMITS = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-4, torch.float64: 1e-6}


class Impossible(Exception):
    """This contender cannot run here; the message is the reason shown in the output."""


class Unverified(Exception):
    """A contender does not compute what it is timed for."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run a denoising step.

    Attributes:
        step: Runs one step, network and all, and returns x, (B, C, h, w).
        loop: Runs all T steps from x_T.
        first: Returns to x_T, so that the next `step` is the first.
        systems: Argument with which `Request.exact` gives the same x after the first step.
        parameters: Everything that must be in memory between steps.
        forward: Only the networks of one step, which can be run on tensors without data.
        compiled: Whether kernels come from a compiler, so that operators cannot be counted.
    """

    step: Callable[[], Tensor]
    loop: Callable[[], Tensor]
    systems: Sequence[Mapping[int, float] | None]
    parameters: Sequence[Tensor]
    forward: Callable[[], object] | None = None
    first: Callable[[], None] = field(default=lambda: None)
    compiled: bool = False


def verify(contenders: Mapping[str, Contender], request: Request) -> dict[str, float]:
    """Return the error of each contender after its first step, relative to the reference.

    Raises:
        Unverified: An error exceeds `LIMITS` or is NaN; the message names the contenders.
    """
    errors = {}
    for name, contender in contenders.items():
        exact = request.exact(contender.systems)
        contender.first()
        x = contender.step().double()
        errors[name] = float((x - exact).norm() / exact.norm())
    limit = LIMITS[request.dtype]
    wrong = {name: f"{error:.2e}" for name, error in errors.items() if not error <= limit}
    if wrong:
        raise Unverified(f"nothing was timed: {wrong} from the reference, at most {limit:.0e}")
    return errors


def effect(contender: Contender, request: Request) -> float | None:
    """Return how far x lies from that of the base model; None: the contender has no adapters.

    Only if this is above the limit would `verify` have noticed missing adapters.
    """
    if contender.systems == [None]:
        return None
    exact = request.exact(contender.systems)
    base = request.exact([None] * len(contender.systems))
    return float((exact - base).norm() / exact.norm())
