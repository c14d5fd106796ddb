# SPDX-License-Identifier: Apache-2.0
r"""A network as a policy: the Gaussian p_theta(x_{t-1} | x_t, c) of one DDIM-eta step, in float32.

With the (guided) network output m of step k, as in `steps`,

    mu = A_k x_t + B_k m,    sigma_k = eta sqrt(v_k),    x_{t-1} ~ N(mu, sigma_k^2).

A step without variance is deterministic: it has no log-probability and nothing to learn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from msdda_fast.errors import InvalidSchedule, InvalidShape
from msdda_fast.steps.ddim import ddim_grid
from msdda_fast.steps.table import coefficient_table
from msdda_fast.types import Scheduler


class Moments(NamedTuple):
    """p_theta(x_{t-1} | x_t) for n transitions; std per transition, the same in every dimension."""

    mean: Tensor  # mu, (n, *S) float32, latent units
    std: Tensor  # sigma > 0, (n,) float32, latent units
    eps: Tensor  # the guided noise prediction up to an x_t term, (n, *S): differences are exact


@dataclass(frozen=True, slots=True)
class Transitions:
    """N steps that a policy took, and the rewards of their trajectories."""

    x_t: Tensor  # (N, *S) float32
    x_prev: Tensor  # (N, *S) float32
    step: Tensor  # (N,) int64, k = 0.. in sampling order, not the timestep
    prompt_index: Tensor  # (N,) int64, row of the table of prompt embeddings
    log_prob: Tensor  # (N,) float32, of the policy that took the step; mean over dimensions
    reward: Tensor  # (N,) float32, r(x_0), in the reward's units
    advantage: Tensor  # (N,) float32, r less the mean of its prompt, in standard deviations

    def __len__(self) -> int:
        return self.step.shape[0]

    def columns(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __getitem__(self, index: Tensor | slice) -> Transitions:
        return Transitions(**{name: column[index] for name, column in self.columns().items()})

    @classmethod
    def cat(cls, parts: Sequence[Transitions]) -> Transitions:
        """Concatenate `parts`, in this order."""
        return cls(**{name: torch.cat([getattr(p, name) for p in parts]) for name in cls.__slots__})

    @classmethod
    def by_trajectory(cls, steps: Sequence[Transitions]) -> Transitions:
        """Reorder K steps of b trajectories each: all steps of the first trajectory come first."""
        order = torch.arange(len(steps) * len(steps[0])).reshape(len(steps), -1).T.flatten()
        return cls.cat(steps)[order]


class DDIMPolicy:
    """The policy of `unet` under T = `num_steps` steps of DDIM at `eta`, with optional guidance.

    Args:
        unet: Called as a diffusers UNet, on its own device.
        scheduler: A diffusers DDIM scheduler; copied, never changed.
        prompt_embeds: Text encoder output per prompt, (P, L, D).
        null_embeds: Text encoder output of the empty prompt, (L, D); needed for guidance.
        num_steps: T.
        eta: In (0, 1]; the same for rollout and log-probability.
        guidance_scale: The policy *is* the guided model: sample it at the same scale later.
        autocast: Returns the context in which the network runs; log-probabilities stay float32.

    Raises:
        InvalidSchedule: No step has variance (eta is 0), clip_sample is on, or T does not fit.
        InvalidShape: The embeddings have the wrong shape.
        ValueError: Guidance needs `null_embeds`.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Scheduler,
        prompt_embeds: Tensor,
        null_embeds: Tensor | None = None,
        *,
        num_steps: int,
        eta: float,
        guidance_scale: float = 1.0,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        grid = ddim_grid(scheduler, num_steps)
        if grid.clip_range is not None:
            raise InvalidSchedule("clip_sample makes the step non-Gaussian; set clip_sample=False")
        table = coefficient_table(scheduler, num_steps, etas=[eta], weights=[1.0])
        self.x_scale, _, self.output_scale, _ = table.rows[:, 0].unbind(-1)
        self.eps_scale = grid.prediction_terms()[3].float()
        self.std = table.std[:, 0].float()
        if not (self.std > 0).any():
            raise InvalidSchedule(f"eta {eta}: no step has variance, so there is nothing to train")
        if prompt_embeds.dim() != 3:
            raise InvalidShape(
                f"prompt_embeds must have shape (P, L, D), got {tuple(prompt_embeds.shape)}"
            )
        if guidance_scale != 1.0 and null_embeds is None:
            raise ValueError(f"guidance_scale {guidance_scale} needs null_embeds")
        if null_embeds is not None and null_embeds.shape != prompt_embeds.shape[1:]:
            raise InvalidShape(
                f"null_embeds must have shape {tuple(prompt_embeds.shape[1:])}, "
                f"got {tuple(null_embeds.shape)}"
            )
        self.unet, self.autocast = unet, autocast
        self.timesteps = table.timesteps
        self.embeds = prompt_embeds.detach()
        self.null_embeds = None if null_embeds is None else null_embeds.detach()
        self.guidance_scale = guidance_scale

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.timesteps)

    def moments(self, x_t: Tensor, step: Tensor, prompt_index: Tensor) -> Moments:
        """Return the Gaussian of each of n steps, from one call of the network (2n rows if guided).

        Args:
            x_t: (n, *S) float32, on the network's device.
            step: (n,) int64 on the CPU, k in [0, T).
            prompt_index: (n,) int64 on the CPU.
        """
        weight = next(self.unet.parameters())
        t = self.timesteps[step].to(weight.device)
        embeds = self.embeds[prompt_index.to(self.embeds.device)].to(weight)
        x = x_t.to(weight)
        if self.guidance_scale == 1.0:
            output = self._network(x, t, embeds)
        else:
            assert self.null_embeds is not None  # checked at birth
            null = self.null_embeds.to(weight).expand_as(embeds)
            both = self._network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, embeds]))
            uncond, cond = both.chunk(2)
            output = uncond + self.guidance_scale * (cond - uncond)

        def per_step(values: Tensor) -> Tensor:
            return values[step].to(x_t.device).reshape(-1, *[1] * (x_t.dim() - 1))

        return Moments(
            mean=per_step(self.x_scale) * x_t + per_step(self.output_scale) * output,
            std=self.std[step].to(x_t.device),
            eps=per_step(self.eps_scale) * output,
        )

    def _network(self, x_t: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        with self.autocast():
            output = self.unet(x_t, t, encoder_hidden_states=embeds, return_dict=False)[0]
        wide: Tensor = output.float()
        return wide

    @torch.no_grad()
    def rollout(
        self, prompt_index: Tensor, shape: Sequence[int], generator: torch.Generator
    ) -> tuple[Tensor, list[Transitions]]:
        """Draw one trajectory per prompt; reward and advantage are 0, for the caller to fill in.

        Args:
            prompt_index: (b,) int64 on the CPU.
            shape: S, of one latent.
            generator: On the CPU, so that a seed gives the same trajectories on every device.

        Returns: x_0, (b, *S) float32 on the network's device, and the transitions of each step that
            has variance, b at a time and on the CPU.
        """
        device = next(self.unet.parameters()).device
        count = len(prompt_index)
        x_t = torch.randn((count, *shape), generator=generator).to(device)
        taken = []
        for k in range(self.num_steps):
            step = torch.full((count,), k)
            moments = self.moments(x_t, step, prompt_index)
            noise = torch.randn((count, *shape), generator=generator).to(device)
            x_prev = moments.mean + self.std[k].to(device) * noise
            if self.std[k] > 0:
                log_prob = gaussian_log_prob(x_prev, moments.mean, moments.std)
                blank = torch.zeros(count)
                taken.append(
                    Transitions(
                        x_t.cpu(), x_prev.cpu(), step, prompt_index, log_prob.cpu(), blank, blank
                    )
                )
            x_t = x_prev
        return x_t, taken


def gaussian_log_prob(x_prev: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    r"""Return log N(x_prev; mean, std^2) per sample, (n,), in float32 or wider.

    It is the mean over the dimensions, which DPOK clips, not their sum.

    Args:
        x_prev, mean: (n, *S), latent units.
        std: (n,), > 0, latent units.

    Raises:
        InvalidShape: The shapes do not match.
    """
    if x_prev.shape != mean.shape or tuple(std.shape) != tuple(mean.shape[:1]):
        raise InvalidShape(
            f"x_prev and mean must share a shape (n, *S) and std be (n,), "
            f"got {tuple(x_prev.shape)}, {tuple(mean.shape)} and {tuple(std.shape)}"
        )
    wide = torch.promote_types(mean.dtype, torch.float32)
    sigma = std.to(wide).reshape(-1, *[1] * (mean.dim() - 1))
    score = (x_prev.to(wide) - mean.to(wide)) / sigma
    flat = (-0.5 * score.square() - sigma.log() - 0.5 * math.log(2 * math.pi)).flatten(1)
    return flat.mean(1)
