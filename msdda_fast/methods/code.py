# SPDX-License-Identifier: Apache-2.0
r"""CoDe: every few steps, keep the candidate whose predicted image has the highest r_w.

A. Singh et al., "CoDe: Blockwise Control for Denoising Diffusion Models". A candidate x_s at
timestep s is judged by its look-ahead: the reward of the decoded x0hat(x_s), with the noise
prediction taken at s itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from torch import Tensor

from msdda_fast.errors import InvalidSchedule
from msdda_fast.levels import ETA
from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.method import Method
from msdda_fast.methods.model import LatentModel
from msdda_fast.methods.particles import best, check_counts, replicate, score
from msdda_fast.methods.sd import SD

__all__ = ["CoDe", "Variant"]

#: "official": the authors' code. "one-step": the CoDe baseline in the code of DB-MPA.
Variant: TypeAlias = Literal["official", "one-step"]


@dataclass(frozen=True, kw_only=True)
class CoDe(Method):
    """Blockwise best-of-N over the noise of the base model; N = 1 is SD.

    "official" runs blocks of B steps on N particles that start from one latent, and keeps the one
    with the best look-ahead at the end of the block; the last block is judged by its images.
    "one-step" chooses among N candidates for one step, by their look-ahead, at k = 0, B, 2B, ...
    except the very last step; the other steps are plain, and no final image is judged.

    Costs per image, for N > 1: evaluations of the base as published; decodes and scores:

        official    N T + N (ceil(T/B) - 1)     N ceil(T/B) of each
        one-step    T + N K                     N K of each and one decode,    K = ceil((T - 1)/B)

    Equal latents have equal predictions: `reuse` evaluates each once, for 1 + N (T - 1) and
    T + (N - 1) K evaluations and the same images.

    Args:
        variant: See above.
        num_particles: N, at least 1.
        block: B, at least 1.
        eta: In (0, 1].
        reuse: Evaluate equal latents once; False evaluates as often as the published code.

    Raises:
        InvalidSchedule: eta outside its range; at 0 all candidates are equal.
        ValueError: Another field is out of its range; while sampling, a reward is NaN.
    """

    name: ClassVar[str] = "CoDe"
    needs_rewards: ClassVar[bool] = True
    variant: Variant = "official"
    num_particles: int = 20
    block: int = 5
    eta: float = 1.0
    reuse: bool = True

    def __post_init__(self) -> None:
        if self.variant not in ("official", "one-step"):
            raise ValueError(f"CoDe: variant is {self.variant!r}, expected official or one-step")
        check_counts(self.name, num_particles=self.num_particles, block=self.block)
        ETA.check_one(self.eta, self.name)
        if self.eta == 0:
            raise InvalidSchedule("CoDe: eta is 0, at which all candidates are equal; use (0, 1]")

    def sample(self, model: LatentModel) -> Tensor:
        """Draw images by blockwise best-of-N, in the chosen variant."""
        if self.num_particles == 1:
            return SD(eta=self.eta).sample(model)
        return self._blocks(model) if self.variant == "official" else self._single_steps(model)

    def _blocks(self, model: LatentModel) -> Tensor:
        num_steps = len(model.grid.timesteps)
        x = model.initial()
        eps = model.eps(x, 0) if self.reuse else None
        for start in range(0, num_steps, self.block):
            x = replicate(x, self.num_particles)
            eps = model.eps(x, start) if eps is None else replicate(eps, self.num_particles)
            stop = min(start + self.block, num_steps)
            for k in range(start, stop):
                if k > start:
                    eps = model.eps(x, k)
                z = model.noise(k, self.num_particles)
                x = DDIMStep.of(model.grid, k, self.eta).prev(x, eps, z)
            if stop < num_steps:
                x, eps = self._choose(model, x, stop)
        images = model.decode(x)
        return best(images, score(model, images), model.batch_size)

    def _single_steps(self, model: LatentModel) -> Tensor:
        last = len(model.grid.timesteps) - 1
        x, eps = model.initial(), None
        for k in range(last + 1):
            step = DDIMStep.of(model.grid, k, self.eta)
            if eps is None:
                eps = model.eps(x, k)
            if k % self.block or k == last:
                x, eps = step.prev(x, eps, model.noise(k)), None
                continue
            x, eps = (replicate(of_parent, self.num_particles) for of_parent in (x, eps))
            x = step.prev(x, eps, model.noise(k, self.num_particles))
            x, eps = self._choose(model, x, k + 1)
        return model.decode(x)

    def _choose(self, model: LatentModel, x: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """Return the winners (B, *S) of the candidates x (N B, *S) before step k, and their eps."""
        eps = model.eps(x, k)
        scores = score(model, model.decode(DDIMStep.of(model.grid, k, self.eta).x0(x, eps)))
        winner = best(x, scores, model.batch_size)
        return winner, best(eps, scores, model.batch_size) if self.reuse else None
