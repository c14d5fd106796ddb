# SPDX-License-Identifier: Apache-2.0
"""What all contenders start from: latents, prompt, noise, coefficients; and the exact result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.contenders.models import Model
from msdda_fast.batched.time import AddedConditions
from msdda_fast.kernels.counter_noise import counter_noise
from msdda_fast.reference import ddim_posterior, fuse_posteriors, guide
from msdda_fast.steps.coefficients import CoefficientTable
from msdda_fast.steps.table import coefficient_table

__all__ = ["Request"]


class Request:
    """A request for B images in T steps, for any number of objectives.

    Attributes:
        model: The model and its objectives.
        batch, num_steps: B and T.
        branches: K, 2 (uncond, cond), or 1 without guidance.
        x: x_T, (B, C, h, w) float32.
        noise: z of every step, (T, B, C, h, w) float32; what the engine draws from `seeds`.
        prompts: (K, B, L, D) in the dtype of the network.
        pooled, time_ids: SDXL's conditions, (K, B, P) and (K, B, 6), or None.
    """

    def __init__(self, model: Model, *, batch: int, num_steps: int) -> None:
        unet = model.unet
        self.model, self.batch, self.num_steps = model, batch, num_steps
        self.device, self.dtype = unet.device, unet.dtype
        self.branches = 1 if model.guidance == 1 else 2
        size = unet.config.sample_size
        self.shape = (batch, unet.config.in_channels, size, size)
        self.seeds = torch.arange(batch, device=self.device)
        self.x = counter_noise(self.seeds, self.shape, stream=0)
        self.noise = torch.stack(
            [counter_noise(self.seeds, self.shape, step=k) for k in range(num_steps)]
        )
        self.scheduler = model.scheduler
        self.scheduler.set_timesteps(num_steps, device=self.device)
        self.prompts, self.pooled = self.encode()
        self.time_ids = None
        if self.pooled is not None:
            pixels = 8 * size
            ids = torch.tensor([pixels, pixels, 0, 0, pixels, pixels], device=self.device)
            self.time_ids = ids.to(self.dtype).expand(self.branches, batch, 6).contiguous()

    @torch.no_grad()
    def encode(self) -> tuple[Tensor, Tensor | None]:
        """Run the text encoders: (K, B, L, D), and for SDXL the pooled text (K, B, P)."""
        ids = self.model.token_ids[-self.branches :].repeat_interleave(self.batch, dim=0)
        rows = (self.branches, self.batch)
        if len(self.model.texts) == 1:
            return self.model.texts[0](ids)[0].unflatten(0, rows), None
        outputs = [text(ids, output_hidden_states=True) for text in self.model.texts]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return embeds.unflatten(0, rows), outputs[-1].text_embeds.unflatten(0, rows)

    @torch.no_grad()
    def decode(self) -> Tensor:
        """Run the autoencoder on latents, and bring the images to the host."""
        vae = self.model.vae
        latents = self.x.to(vae.dtype) / vae.config.scaling_factor
        return vae.decode(latents, return_dict=False)[0].to("cpu")

    def weights(self, count: int) -> list[float]:
        """Return w of M objectives, all different, so that mixed-up objectives are noticed."""
        total = count * (count + 1) / 2
        return [(m + 1) / total for m in range(count)]

    def table(self, count: int) -> CoefficientTable:
        """Return the coefficients of the first M objectives."""
        return coefficient_table(
            self.scheduler,
            self.num_steps,
            etas=self.model.etas[:count],
            weights=self.weights(count),
            guidance_scale=self.model.guidance,
            device=self.device,
        )

    def added(self) -> AddedConditions | None:
        """Return SDXL's conditions for the batched forward, shared by all objectives."""
        if self.pooled is None or self.time_ids is None:
            return None
        return AddedConditions(self.pooled[None], self.time_ids[None])

    def conditions(self, repeats: int = 1, dtype: torch.dtype | None = None) -> dict[str, object]:
        """Return the arguments of a stock UNet for rows (repeats, K, B)."""
        dtype = dtype or self.dtype

        def rows(tensor: Tensor) -> Tensor:
            flat = tensor.flatten(0, 1).to(dtype)
            return flat.repeat(repeats, *(1,) * (flat.ndim - 1))

        given: dict[str, object] = {"encoder_hidden_states": rows(self.prompts)}
        if self.pooled is not None and self.time_ids is not None:
            given["added_cond_kwargs"] = {
                "text_embeds": rows(self.pooled),
                "time_ids": rows(self.time_ids),
            }
        return given

    def exact(self, systems: Sequence[Mapping[int, float] | None]) -> Tensor:
        """Return x after the first step of the fused systems, by `reference.py`, in float64.

        Args:
            systems: For each objective, the adapters in its weights, see `Model.plain`; None: the
                base.
        """
        ends = self._alphas()
        x = self.x.double()
        etas = self.model.etas
        moments = []
        for m, system in enumerate(systems):
            output = self._output(system).double()
            guided = output[0] if len(output) == 1 else guide(*output, self.model.guidance)
            moments.append(ddim_posterior(x, guided, *ends, etas[m]))
        means, variances = (torch.stack(list(part)) for part in zip(*moments, strict=True))
        weights = torch.tensor(self.weights(len(systems)), dtype=torch.float64, device=x.device)
        mean, variance = fuse_posteriors(means, variances, weights)
        return mean + variance.sqrt() * self.noise[0].double()

    @torch.no_grad()
    def _output(self, system: Mapping[int, float] | None) -> Tensor:
        """Return the raw outputs (K, B, C, h, w) of one network in `precise`; cached."""
        key = None if system is None else tuple(system.items())
        if key not in self._outputs:
            dtype = self.precise
            unet = self.model.plain({} if system is None else system, dtype)
            rows = self.x.to(dtype).repeat(self.branches, 1, 1, 1)
            t = self.scheduler.timesteps[0]
            out = unet(rows, t, **self.conditions(dtype=dtype), return_dict=False)[0]
            self._outputs[key] = out.unflatten(0, (self.branches, self.batch))
        return self._outputs[key]

    @cached_property
    def precise(self) -> torch.dtype:
        """Data type of the reference: float64 for small networks, float32 for the others."""
        small = sum(p.numel() for p in self.model.unet.parameters()) < 50e6
        return torch.float64 if small else torch.float32

    @cached_property
    def _outputs(self) -> dict[tuple[tuple[int, float], ...] | None, Tensor]:
        return {}

    def _alphas(self) -> tuple[float, float]:
        scheduler = self.scheduler
        t = int(scheduler.timesteps[0])
        prev = t - scheduler.config.num_train_timesteps // self.num_steps
        before = scheduler.alphas_cumprod[prev] if prev >= 0 else scheduler.final_alpha_cumprod
        return float(scheduler.alphas_cumprod[t]), float(before)
