# SPDX-License-Identifier: Apache-2.0
"""`LatentModel` in the Gaussian world: every network is an ideal denoiser of scalar data.

Images are the latents themselves. Samples are as many as asked for, so a sampler that is not affine
is measured by Monte Carlo; one that is affine is measured exactly, on impulses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import msdda_fast as mf
from msdda_fast.levels import TimestepRange
from msdda_fast.lora.soup import Merge
from msdda_fast.methods.method import Method
from msdda_fast.methods.model import BASE, Cost, DDIMLevels, Fusion
from msdda_fast.steps.ddim import DDIMGrid, ddim_grid
from tests.gaussian_world import Gaussian, Moments, measured_moments, sd15_scheduler


@dataclass(frozen=True)
class Soup:
    """Averaged weights of denoisers that are linear in them, as a table of eps by t would be."""

    parts: list[tuple[float, Gaussian]]

    def eps_affine(self, alpha_bar: float) -> tuple[float, float]:
        lines = [(w, data.eps_affine(alpha_bar)) for w, data in self.parts]
        return sum(w * line[0] for w, line in lines), sum(w * line[1] for w, line in lines)

    denoiser = Gaussian.denoiser


ScalarReward = Callable[[Tensor], Tensor]


@dataclass
class GaussianModel(DDIMLevels):
    """B scalars, (B, 1) float64.

    Args:
        models: Data of each model by name, `BASE` among them.
        preference: By name of a model and reward.
        etas: By name of a model.
        scalar_rewards: By name, from x_0 (n,) to (n,).
        files: Data of the models that can be loaded, by path.
        acts: Whether a model acts in each step, by name; others act in all.
        x_T, z: Given randomness (B, 1) and (T, B, 1) in place of drawn one.
    """

    models: Mapping[str, Gaussian | Soup]
    preference: Mapping[str, float] = field(default_factory=dict)
    etas: Mapping[str, float] = field(default_factory=dict)
    scalar_rewards: Mapping[str, ScalarReward] = field(default_factory=dict)
    files: Mapping[str, Gaussian] = field(default_factory=dict)
    acts: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    batch_size: int = 1
    num_steps: int = 50
    x_T: Tensor | None = None
    z: Tensor | None = None
    seed: int = 0
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        self.scheduler = sd15_scheduler()
        self.grid: DDIMGrid = ddim_grid(self.scheduler, self.num_steps)

    def initial(self) -> Tensor:
        return self._draw(-1, 0, 0) if self.x_T is None else self.x_T

    def noise(self, k: int, particles: int = 1, *, purpose: int = 0) -> Tensor:
        drawn = [self._draw(k, purpose, particle) for particle in range(particles)]
        if purpose == 0 and self.z is not None:
            drawn[0] = self.z[k]
        return torch.cat(drawn)

    def uniform(self, k: int, *, purpose: int) -> Tensor:
        return torch.special.ndtr(self._draw(k, purpose, 0)[:, 0])

    def acting(self, name: str, k: int) -> str:
        return name if name not in self.acts or self.acts[name][k] else BASE

    def eps(self, x: Tensor, k: int, name: str = BASE, rows: Tensor | None = None) -> Tensor:
        self.cost.unet_forwards += len(x)
        slope, offset = self.models[self.acting(name, k)].eps_affine(
            float(self.grid.alpha_bar_t[k])
        )
        output = slope * x + offset
        if output.requires_grad:
            output.register_hook(lambda grad: self._count_backward(len(grad)))
        return output

    def decode(self, x_0: Tensor) -> Tensor:
        self.cost.decodes += len(x_0)
        return x_0

    def rewards(self, images: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
        active = [name for name, weight in self.preference.items() if weight != 0]
        self.cost.reward_calls += len(images) * len(active)
        return {name: self.scalar_rewards[name](images[:, 0]) for name in active}

    def generate(
        self,
        weights: Mapping[str, float],
        etas: Mapping[str, float],
        *,
        fusion: Fusion = "posterior",
        extrapolate: bool = False,
    ) -> Tensor:
        active = sum(weight != 0 for weight in weights.values())
        self.cost.unet_forwards += self.batch_size * self.num_steps * active
        return mf.denoise(
            [self.models[name].denoiser(self.scheduler) for name in weights],
            self.initial(),
            scheduler=self.scheduler,
            num_steps=self.num_steps,
            weights=list(weights.values()),
            etas=[etas[name] for name in weights],
            noise=torch.stack([self.noise(k) for k in range(self.num_steps)]),
            extrapolate=extrapolate,
            fusion=fusion,
        )

    @contextmanager
    def redraw(self, number: int) -> Iterator[None]:
        self.seed += number
        yield
        self.seed -= number

    def soup(
        self, weights: Mapping[str, float], merge: Merge = "product", rotation: int | None = None
    ) -> str:
        assert merge == "product", "there are no factors here"
        self.models = {
            **self.models, "soup": Soup([(w, self.models[name]) for name, w in weights.items()])
        }  # fmt: skip
        return "soup"

    def load(self, path: str | Path, timesteps: TimestepRange | None = None) -> str:
        assert timesteps is None, "steps are told apart by number here"
        self.models = {**self.models, "loaded": self.files[str(path)]}
        return "loaded"

    def _count_backward(self, count: int) -> None:
        self.cost.unet_backwards += count

    def _draw(self, k: int, purpose: int, copy: int) -> Tensor:
        generator = torch.Generator().manual_seed(
            ((self.seed * 64 + purpose) * 1024 + copy) * 2048 + k + 1
        )
        return torch.randn(self.batch_size, 1, generator=generator, dtype=torch.float64)


def sampled(method: Method, model: GaussianModel) -> Tensor:
    """x_0 of every sample, (B,)."""
    with torch.no_grad():
        return method.sample(model)[:, 0]


def exact_moments(
    method: Method,
    models: Mapping[str, Gaussian],
    *,
    num_steps: int = 50,
    **settings: object,
) -> Moments:
    """Moments of x_0 of a method that is affine in (x_T, z); see `measured_moments`."""

    def run(x_T: Tensor, z: Tensor) -> Tensor:
        model = GaussianModel(
            models, batch_size=len(x_T), num_steps=num_steps, x_T=x_T, z=z, **settings
        )
        with torch.no_grad():
            return method.sample(model)

    return measured_moments(run, num_steps)
