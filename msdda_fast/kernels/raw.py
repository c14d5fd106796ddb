# SPDX-License-Identifier: Apache-2.0
"""What a backend of each operator provides: raw functions that check nothing.

Every module `kernels/<op>/_<backend>.py` satisfies the protocol of its operator, and
`registry.resolve` returns one (mypy
compares them in `verify`). The functions write into tensors that their caller allocated, so
that a captured graph can replay them at fixed addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = [
    "CounterNoiseBackend",
    "FusedStepBackend",
    "GroupNormBackend",
    "GroupedLoraBackend",
    "RowwiseBackend",
    "RunLinear",
    "RunMoments",
]


class RunLinear(Protocol):
    """A step from raw network outputs; see `steps.coefficients.Layout` for the equation."""

    def __call__(
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
        """Write x_prev.

        Args:
            out: (B, *S), any float dtype, written; may be `x` itself.
            x: (B, *S), or None where x_scale is 0.
            outputs: M tensors (K, B, *S) of one float dtype, K = 2 (uncond, cond) or 1 (cond); None
                for an objective whose coefficients are all 0.
            rows: Coefficients (B | 1, C), or (T, B | 1, C) of which row `step` is used; float32, or
                float64 to compute in float64.
            step: An int, or a 0-d int64 tensor on the device of `out`, read inside the kernel: the
                row of `rows` and of `noise`, and the counter of the noise.
            clip_range: r of the clipped layout, latent units; None for the linear one.
            noise: z (B, *S), or (T, B, *S) of which entry `step` is used.
            seeds: (B,) contiguous int64, in place of `noise`; with neither there is no noise term.
            next_input: (R, B, *S), any float dtype and layout, written: R copies of `out`,
                converted, for the R rows per sample that the network takes.
        """


class RunMoments(Protocol):
    """A step from Gaussian moments, Eq. 7 element by element."""

    def __call__(
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
        """Write x_prev.

        Args:
            out: (B, *S), any float dtype, written.
            means: M tensors (B, *S) of one float dtype.
            variances: (M, 1 | B, 1 | *S) float32 or float64, the dtype of the arithmetic.
            weights: The same, in the dtype of `variances`.
            step, noise, seeds: As in `RunLinear`.
            mean: (B, *S) in the dtype of `weights`, written: mu_w.
            variance: Likewise: sigma_w^2.
        """


class FusedStepBackend(Protocol):
    """A backend of `fused_step`; the attributes of a module, or the methods of an object."""

    @property
    def run(self) -> RunLinear: ...

    @property
    def run_moments(self) -> RunMoments: ...


class CounterNoiseBackend(Protocol):
    """A backend of `counter_noise`."""

    def run(self, out: Tensor, seeds: Tensor, step: int | Tensor, stream: int) -> None:
        """Write the noise of `seeds`.

        Args:
            out: (B, C, ...) contiguous, float16, bfloat16, float32 or float64, written.
            seeds: (B,) int64 on the device of `out`, contiguous.
            step: An int, or a 0-d int64 tensor on the device of `out`, read inside the kernel.
            stream: STREAM_INITIAL for x_T (with step 0), STREAM_STEP for the step noise.
        """


class GroupedLoraBackend(Protocol):
    """A backend of `grouped_lora`."""

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor
    ) -> Tensor:
        """Return y[m] = x[m] W^T + b + (x[m] A_m^T) B_m^T.

        Args:
            x: (M, rows, C) dense.
            weight: (N, C) dense, in the dtype of `x`, as all that follow.
            bias: (N,), or None.
            down: A_m, (M, R, C) dense.
            up: B_m, scale folded in, (M, N, R) dense.

        Returns:
            (M, rows, N), new, in the dtype of `x`.
        """


class GroupNormBackend(Protocol):
    """A backend of `group_norm`."""

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        shift: Tensor | None,
        silu: bool,
    ) -> Tensor:
        """Return the group norm of x + shift, and its SiLU if `silu`.

        Args:
            x: (D, C, h, w) dense in channels_last.
            weight, bias: (C,) in the dtype of `x`.
            groups: A divisor of C.
            eps: Added to the variance, in the unit of x squared.
            shift: (D or 1, C), channels adjacent; None: 0.
            silu: Whether SiLU follows.

        Returns:
            (D, C, h, w) dense in channels_last, new, in the dtype of `x`.
        """


class RowwiseBackend(Protocol):
    """A backend of `rowwise`: rows of channels, any number of axes before them."""

    def sum_of(self, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        """Return a + b + bias, dense: a and b (..., C) of one shape and dtype, bias (C,)."""

    def sum_and_norm(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        shift: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Return s = a + b + bias and the layer norm of its rows, s' weight + shift; both dense.

        Args:
            a, b, bias: As in `sum_of`.
            weight, shift: (C,); None: 1 and 0.
            eps: Added to the variance of a row.
        """

    def geglu(self, x: Tensor) -> Tensor:
        """Return value * gelu(gate), (..., C), of x = [value, gate], (..., 2 C) dense."""
