# SPDX-License-Identifier: Apache-2.0
"""The source of x_T and of the noise z of each step, chosen and checked once, before any work.

At most one of three sources: given tensors, counter-based noise from one seed per sample (values
depend on nothing else in the batch), or generators, drawn in the order of stock diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape
from msdda_fast.kernels.counter_noise import STREAM_INITIAL, as_seeds, counter_noise, seed_list
from msdda_fast.kernels.randomness import check_one_source, draw

if TYPE_CHECKING:
    from msdda_fast.steps.coefficients import CoefficientTable
    from msdda_fast.types import GeneratorLike, SeedsLike

__all__ = ["NoiseSource", "StepNoise", "image_seeds", "noise_source"]


class StepNoise(TypedDict, total=False):
    """The noise arguments of `fused_ddim_step` and `fast_fuse_step` for one step."""

    noise: Tensor
    seeds: Tensor
    step: int


@dataclass(frozen=True, slots=True)
class NoiseSource:
    """One source of noise for samples of shape (B, *S); build it with `noise_source`.

    Attributes:
        shape: (B, *S).
        noise: (T, B, *S), or None.
        seeds: (B,) int64, or None.
        generator: One, or one per sample; None without another source: torch's default generator.
        noise_sampler: z of step k, (B, *S), or None.
    """

    shape: torch.Size
    noise: Tensor | None
    seeds: Tensor | None
    generator: GeneratorLike | None
    noise_sampler: Callable[[int], Tensor] | None = None

    def initial(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw x_T, (B, *S) standard normal: stream 0, step 0 of the seeds, or the generator."""
        if self.seeds is not None:
            return counter_noise(
                self.seeds, self.shape, stream=STREAM_INITIAL, device=device, dtype=dtype
            )
        return draw(self.shape, self.generator, torch.device(device), dtype)

    def step(self, k: int, like: Tensor) -> StepNoise:
        """Return the noise arguments of step k = 0, 1, ... in sampling order.

        `like` is a network output of that step: generators draw in its dtype, as diffusers does.
        """
        if self.noise is not None:
            return {"noise": self.noise[k]}
        if self.seeds is not None:
            return {"seeds": self.seeds, "step": k}
        if self.noise_sampler is not None:
            return {"noise": self.noise_sampler(k)}
        return {"noise": draw(self.shape, self.generator, like.device, like.dtype)}

    def drawn_for(self, table: CoefficientTable) -> NoiseSource:
        """Return the source for a generation over `table`: zeros if no step adds noise.

        With eta = 0 throughout, generators do not advance, as in diffusers.
        """
        if table.std.any():
            return self
        zero = torch.zeros((), device=table.rows.device)
        return replace(self, noise=zero.expand(len(table), *self.shape))


def noise_source(
    shape: Sequence[int],
    num_steps: int,
    device: torch.device | str,
    *,
    noise: Tensor | None = None,
    seeds: SeedsLike | None = None,
    generator: GeneratorLike | None = None,
    noise_sampler: Callable[[int], Tensor] | None = None,
) -> NoiseSource:
    """Check the one source of noise given for `num_steps` steps of samples of shape `shape`.

    Args:
        shape: (B, *S).
        num_steps: T.
        device: Where sampling runs.
        noise: z of every step, (T, B, *S).
        seeds: One 64-bit seed per sample, (B,).
        generator: One generator for the batch, or one per sample.
        noise_sampler: z of step k, (B, *S), from k = 0, 1, ... in sampling order.

    Raises:
        ValueError: More than one source, or a seed that is not an integer of 64 bits.
        InvalidShape: A source that does not fit T and B, or noise on another device.
    """
    check_one_source(noise=noise, seeds=seeds, generator=generator, noise_sampler=noise_sampler)
    size, device = torch.Size(shape), torch.device(device)
    if noise is not None:
        if noise.shape != (num_steps, *size):
            raise InvalidShape(
                f"noise has shape {tuple(noise.shape)}, expected (T, B, *S) = {(num_steps, *size)}"
            )
        if noise.device != device or not noise.is_floating_point():
            raise InvalidShape(
                f"noise is {noise.dtype} on {noise.device}, expected floating point on {device}"
            )
    if isinstance(generator, Sequence) and len(generator) != size[0]:
        raise InvalidShape(f"got {len(generator)} generators, expected one, or one per {size[0]}")
    if seeds is not None:
        if len(size) < 2:
            raise InvalidShape(f"seeds need samples (B, C, ...) with a channel axis, got {shape}")
        seeds = as_seeds(seeds, size[0], device)
    return NoiseSource(size, noise, seeds, generator, noise_sampler)


def image_seeds(seed: int | SeedsLike, batch_size: int) -> list[int]:
    """Return one seed per image: several as they are, an integer s as s, s + 1, ... (modulo 2^64).

    Raises:
        InvalidShape: There are several, and not `batch_size`.
        ValueError: A seed is not an integer of 64 bits, signed or unsigned.
    """
    if isinstance(seed, str) or not hasattr(seed, "__len__") or getattr(seed, "ndim", 1) == 0:
        [seed] = seed_list([cast(int, seed)])
        return [(seed + index) % 2**64 for index in range(batch_size)]
    seeds = seed_list(cast("SeedsLike", seed))
    if len(seeds) != batch_size:
        raise InvalidShape(f"got {len(seeds)} seeds for {batch_size} images")
    return seeds
