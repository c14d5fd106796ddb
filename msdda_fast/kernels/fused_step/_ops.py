# SPDX-License-Identifier: Apache-2.0
"""The raw functions of the fused step as operators of torch.library, which tracers can see."""

from collections.abc import Sequence

from torch import Tensor, ops

from msdda_fast.kernels import registry
from msdda_fast.kernels.library import as_tensor, register_in_place

__all__ = ["Operators"]


class Operators:
    """`run` and `run_moments` of a backend, as operators; the backend is resolved when they run."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def run(
        self,
        out: Tensor,
        x: Tensor | None,
        outputs: Sequence[Tensor | None],
        rows: Tensor,
        *,
        step: int | Tensor = 0,
        clip_range: float | None = None,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
        next_input: Tensor | None = None,
    ) -> None:
        ops.msdda_fast.fused_step_(
            out, x, list(outputs), rows, clip_range,
            as_tensor(step, out), noise, seeds, next_input, self.backend,
        )  # fmt: skip

    def run_moments(
        self,
        out: Tensor,
        means: Sequence[Tensor],
        variances: Tensor,
        weights: Tensor,
        *,
        step: int | Tensor = 0,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
        mean: Tensor | None = None,
        variance: Tensor | None = None,
    ) -> None:
        ops.msdda_fast.fused_moments_(
            out, list(means), variances, weights,
            as_tensor(step, out), noise, seeds, mean, variance, self.backend,
        )  # fmt: skip


def _fused_step_(
    out: Tensor,
    x: Tensor | None,
    outputs: Sequence[Tensor | None],
    rows: Tensor,
    clip_range: float | None,
    step: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    next_input: Tensor | None,
    backend: str,
) -> None:
    registry.resolve("fused_step", backend, out.device.type).run(
        out, x, outputs, rows,
        step=step, clip_range=clip_range, noise=noise, seeds=seeds, next_input=next_input,
    )  # fmt: skip


def _fused_moments_(
    out: Tensor,
    means: Sequence[Tensor],
    variances: Tensor,
    weights: Tensor,
    step: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    backend: str,
) -> None:
    registry.resolve("fused_step", backend, out.device.type).run_moments(
        out, means, variances, weights,
        step=step, noise=noise, seeds=seeds, mean=mean, variance=variance,
    )  # fmt: skip


_NOISE = "Tensor step, Tensor? noise, Tensor? seeds"
register_in_place(
    "fused_step_",
    "Tensor(a!) out, Tensor? x, Tensor?[] outputs, Tensor rows, float? clip_range, "
    f"{_NOISE}, Tensor(b!)? next_input, str backend",
    _fused_step_,
)
register_in_place(
    "fused_moments_",
    "Tensor(a!) out, Tensor[] means, Tensor variances, Tensor weights, "
    f"{_NOISE}, Tensor(b!)? mean, Tensor(c!)? variance, str backend",
    _fused_moments_,
)
