# SPDX-License-Identifier: Apache-2.0
"""The noise of a loop that somebody else wrote: from seeds, a generator, or what the loop gives."""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdda_fast.kernels.counter_noise import STREAM_STEP, as_seeds, counter_noise
from msdda_fast.kernels.randomness import draw

if TYPE_CHECKING:
    from msdda_fast.types import GeneratorLike, SeedsLike

__all__ = ["LoopNoise"]

#: The counter noise of deep copies is on the streams from here on.
_STREAM_COPIES = 16


class LoopNoise:
    """At most one of seeds and generators; with neither, what the loop gives `step`.

    A deep copy draws from the same seeds on another stream, so that two modalities of one image are
    independent: the n-th copy since `begin` always on the same. Generators are shared with it.

    Attributes:
        seeds: One 64-bit seed per sample, or None.
        generator: One, or one per sample, or None.
    """

    def __init__(self, seeds: SeedsLike | None, generator: GeneratorLike | None) -> None:
        self.seeds, self.generator = seeds, generator
        self._stream, self._copies = STREAM_STEP, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> LoopNoise:
        made = copy.copy(self)
        made._stream, made._copies = _STREAM_COPIES * self._stream + self._copies, 0
        self._copies += 1
        return made

    def begin(self) -> None:
        """A run begins: count deep copies anew."""
        self._copies = 0

    def of_step(
        self, k: int, sample: Tensor, dtype: torch.dtype, generator: GeneratorLike | None
    ) -> dict[str, Any]:
        """Return the noise arguments of `fused_ddim_step`.

        Args:
            k: The step.
            sample: (B, *S).
            dtype: What generators draw in.
            generator: The loop's.
        """
        if self.seeds is None:
            own = generator if self.generator is None else self.generator
            return {"noise": draw(sample.shape, own, sample.device, dtype)}
        seeds = as_seeds(self.seeds, len(sample), sample.device)
        if self._stream == STREAM_STEP:
            return {"seeds": seeds, "step": k}
        shape, device = sample.shape, sample.device
        return {"noise": counter_noise(seeds, shape, step=k, stream=self._stream, device=device)}

    def generators(self, k: int, batch_size: int) -> GeneratorLike | None:
        """Return generators for a stock step k that draws by itself; None: the loop's."""
        if self.seeds is None:
            return self.generator
        seeds = as_seeds(self.seeds, batch_size, torch.device("cpu")).tolist()
        states = [random.Random(f"{seed} {self._stream} {k}").getrandbits(63) for seed in seeds]
        return [torch.Generator().manual_seed(state) for state in states]
