# SPDX-License-Identifier: Apache-2.0
"""`LatentModel` for a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from msdda_fast.adapters.variant import Variant
from msdda_fast.engine.noise import image_seeds
from msdda_fast.errors import UnknownObjective
from msdda_fast.kernels.counter_noise import STREAM_INITIAL, STREAM_STEP, as_seeds, counter_noise
from msdda_fast.levels import TimestepRange
from msdda_fast.lora.soup import Merge
from msdda_fast.methods.model import BASE, Cost, DDIMLevels, Fusion, Level
from msdda_fast.methods.model_variants import ModelVariants
from msdda_fast.methods.streams import chances, stream_of
from msdda_fast.pipelines import request
from msdda_fast.pipelines.stable_diffusion.decoding import decode
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.rewards import Reward
from msdda_fast.steps.ddim import ddim_grid
from msdda_fast.weights import preference_weights

__all__ = ["PipelineModel"]

#: Latents per forward of a network, and per decode: what a call with many particles is cut into.
MAX_ROWS = 64

#: By pipeline, the views of it with other objectives, so that their networks are built once. Models
#: made for one `PipelineModel` are not among them.
_views: MutableMapping[MSDDAPipeline, dict[tuple[str, ...], MSDDAPipeline]] = WeakKeyDictionary()


class PipelineModel(DDIMLevels):
    """`LatentModel` over the networks of a pipeline; a context manager that restores them.

    Args:
        pipe: Its objectives are the aligned models.
        prompts: B texts.
        weights: Preference, by names of objectives or rewards.
        seeds: One per prompt.
        num_steps: T.
        guidance_scale: The scale of every model; None: the objectives' own.
        rewards: By name; None if no rewards are evaluated.

    Raises: As `Method.__call__`.
    """

    def __init__(
        self,
        pipe: MSDDAPipeline,
        prompts: Sequence[str],
        weights: Mapping[str, float],
        seeds: Sequence[int],
        *,
        num_steps: int,
        guidance_scale: float | None = None,
        rewards: Mapping[str, Reward] | None = None,
    ) -> None:
        objectives = pipe.objectives
        known = {**objectives, **(rewards or {})}
        if unknown := [name for name in weights if name not in known]:
            raise UnknownObjective(f"unknown objective {unknown[0]!r}; known: {', '.join(known)}")
        row = preference_weights(dict(weights), list(weights), 1)[0]
        self.preference = dict(zip(weights, row.tolist(), strict=True))
        self.etas = {name: objective.eta for name, objective in objectives.items()}
        self.batch_size = len(prompts)
        self.cost = Cost()
        self.grid = ddim_grid(pipe.scheduler, num_steps)
        scales = request.objective_guidance(objectives, guidance_scale)
        self._models = ModelVariants(pipe, dict(zip(objectives, scales, strict=True)))
        self._pipe = pipe
        self._prompts = list(prompts)
        self._rewards = dict(rewards or {})
        self._device = pipe._execution_device
        self._seeds = image_seeds(list(seeds), self.batch_size)
        shape = request.latent_shape(
            self.batch_size, pipe.unet.config, pipe.vae_scale_factor, None, None
        )
        self._shape = shape[1:]
        self._texts: dict[tuple[str | None, float], Tensor] = {}
        self._views_of_made: dict[tuple[str, ...], MSDDAPipeline] = {}

    def __enter__(self) -> Self:
        self._models.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._views_of_made.clear()
        self._models.close()

    def initial(self) -> Tensor:
        """Return x_T, (B, *S) float32."""
        return self._draw(0, STREAM_INITIAL)

    def noise(self, k: int, particles: int = 1, *, purpose: int = 0) -> Tensor:
        """Return z of step k for N particles, (N B, *S), by stream of counter noise."""
        streams = [stream_of(purpose, particle) for particle in range(particles)]
        if purpose == 0:
            streams[0] = STREAM_STEP
        return torch.cat([self._draw(k, stream) for stream in streams])

    def uniform(self, k: int, *, purpose: int) -> Tensor:
        """Return one random number in (0, 1) per sample for a choice at step k, (B,)."""
        return chances(self._seeds, k, purpose).to(self._device)

    def acting(self, name: str, k: int) -> str:
        """Return whose network runs at step k: the base's outside of the model's timesteps."""
        return self._models.acting(name, float(self.grid.timesteps[k]))

    def eps(self, x: Tensor, k: int, name: str = BASE, rows: Tensor | None = None) -> Tensor:
        """Return the guided noise prediction of one model at step k, (n, *S)."""
        rows, name = self._rows(x, rows), self.acting(name, k)
        terms = self.grid.prediction_terms()[2:]
        of_x, of_output = (float(term[k]) for term in terms)
        parts = [
            self._predict(part, k, name, rows_)
            for part, rows_ in zip(
                torch.split(x, MAX_ROWS), torch.split(rows, MAX_ROWS), strict=True
            )
        ]
        return of_x * x + of_output * torch.cat(parts)

    def decode(self, x_0: Tensor) -> Tensor:
        """Return the images (n, 3, H, W) in [0, 1] of latents (n, *S)."""
        self.cost.decodes += len(x_0)
        parts = [decode(self._pipe.vae, part) for part in torch.split(x_0, MAX_ROWS)]
        return (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1)

    def rewards(self, images: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Return the rewards whose preference is not 0, by name, (n,) each."""
        prompts = [self._prompts[row] for row in self._rows(images, rows).tolist()]
        if not images.requires_grad:
            images = (255 * images).round() / 255
        active = [name for name, weight in self.preference.items() if weight != 0]
        self.cost.reward_calls += len(images) * len(active)
        return {name: self._rewards[name](images, prompts) for name in active}

    def generate(
        self,
        weights: Mapping[str, float],
        etas: Mapping[str, Level],
        *,
        fusion: Fusion = "posterior",
        extrapolate: bool = False,
    ) -> Tensor:
        """Return x_0, (B, *S), from the fused reverse steps of several models."""
        view = self._view(tuple(weights))
        active = [name for name, weight in weights.items() if weight != 0]
        branches = 2 if any(self._models.guidance[name] != 1 for name in active) else 1
        steps = range(len(self.grid.timesteps))
        networks = sum(len({self.acting(name, k) for name in active}) for k in steps)
        self.cost.unet_forwards += self.batch_size * branches * networks
        x_0: Tensor = view(
            self._prompts,
            num_inference_steps=len(self.grid.timesteps),
            weights=dict(weights),
            etas={name: etas[name] for name in weights},
            guidance_scale={name: self._models.guidance[name] for name in weights},
            seed=self._seeds,
            extrapolate=extrapolate,
            fusion=fusion,
            output_type="latent",
        ).images
        return x_0

    @contextmanager
    def redraw(self, number: int) -> Iterator[None]:
        """Within the context, draw with seeds that differ from the usual ones in high bits."""
        usual = self._seeds
        self._seeds = [seed ^ (number << 40) for seed in usual]
        try:
            yield
        finally:
            self._seeds = usual

    def soup(
        self, weights: Mapping[str, float], merge: Merge = "product", rotation: int | None = None
    ) -> str:
        """Make the model of averaged weights and return its name."""
        return self._models.soup(weights, merge, rotation)

    def load(self, path: str | Path, timesteps: TimestepRange | None = None) -> str:
        """Make a model of the base and the adapter at `path`, and return its name."""
        return self._models.load(path, timesteps)

    def _view(self, names: tuple[str, ...]) -> MSDDAPipeline:
        """Return the pipeline with the named models as its objectives."""
        made = not self._models.made.isdisjoint(names)
        views = self._views_of_made if made else _views.setdefault(self._pipe, {})
        view = views.get(names)
        variants = {name: self._models.variants[name] for name in names}
        if view is None or view.variants != variants:
            view = MSDDAPipeline.from_pipe(self._pipe)
            view.set_objectives({name: self._models.objective(name) for name in names}, variants)
            view.set_progress_bar_config(disable=True)
            views[names] = view
        return view

    def _predict(self, x: Tensor, k: int, name: str, rows: Tensor) -> Tensor:
        """Return the guided output of one network, (n, *S) in the dtype of x."""
        variant, scale = self._models.variants[name], self._models.guidance[name]
        text = self._text(variant)  # (K, B, L, D)
        rows_run = len(text) * len(x)
        self.cost.unet_forwards += rows_run
        timestep = self.grid.timesteps[k].to(self._device)
        output = self._models.switch.predict(variant, x, timestep, text[:, rows]).to(x.dtype)
        if output.requires_grad:
            output.register_hook(partial(self._count_backward, rows_run))  # type: ignore[no-untyped-call]
        uncond, cond = output[0], output[-1]
        return uncond + scale * (cond - uncond) if scale != 1 else cond

    def _count_backward(self, count: int, grad: Tensor) -> None:
        self.cost.unet_backwards += count

    def _text(self, variant: Variant) -> Tensor:
        """Return the embeddings (K, B, L, D) of the text encoder with this variant's adapter."""
        key = (variant.adapter, variant.scale)
        if key not in self._texts:
            self._models.switch.select(*key)
            guided = any(scale != 1 for scale in self._models.guidance.values())
            with torch.no_grad():
                cond, uncond = self._pipe.encode_prompt(self._prompts, self._device, 1, guided)
            self._texts[key] = torch.stack([uncond, cond] if guided else [cond])
        return self._texts[key]

    def _draw(self, step: int, stream: int) -> Tensor:
        seeds = as_seeds(self._seeds, self.batch_size, self._device)
        shape = (self.batch_size, *self._shape)
        return counter_noise(seeds, shape, step=step, stream=stream, device=self._device)

    def _rows(self, x: Tensor, rows: Tensor | None) -> Tensor:
        return torch.arange(len(x), device=x.device) % self.batch_size if rows is None else rows
