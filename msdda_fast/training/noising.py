# SPDX-License-Identifier: Apache-2.0
"""One batch of the expectation in Eq. 4: draw pairs, timesteps and noise, run both models."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from msdda_fast.errors import InvalidShape
from msdda_fast.resume import digest
from msdda_fast.training.adapter import base_model
from msdda_fast.training.config import StepDPOConfig
from msdda_fast.training.pairs import PreferencePairs
from msdda_fast.training.step_dpo import (
    PREDICTION_TYPES,
    StepDPOLoss,
    dpo_coefficient,
    snr_weight,
    step_dpo_loss,
    to_epsilon,
)


class SchedulerConfig(Protocol):
    """The field of a diffusers scheduler's config that training reads."""

    prediction_type: str


class NoiseSchedule(Protocol):
    """The part of a diffusers scheduler that training reads."""

    alphas_cumprod: Tensor  # (num_train_steps,)

    @property
    def config(self) -> SchedulerConfig: ...


class NoisedPairs:
    """Draws batches of noised pairs and computes their loss.

    Chosen and rejected share prompt, timestep, prompt dropout and (by default) noise. Everything
    is drawn on the CPU, so that a seed means the same batch on every device.
    """

    def __init__(
        self,
        scheduler: NoiseSchedule,
        pairs: PreferencePairs,
        prompt_embeds: Tensor,
        null_embeds: Tensor | None,
        config: StepDPOConfig,
    ) -> None:
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"the scheduler's prediction_type is {self.prediction_type!r}; "
                f"training takes one of {PREDICTION_TYPES}"
            )
        if prompt_embeds.dim() != 3:
            raise InvalidShape(
                f"prompt_embeds must have shape (P, L, D), got {tuple(prompt_embeds.shape)}"
            )
        lowest, highest = int(pairs.prompt_index.min()), int(pairs.prompt_index.max())
        if lowest < 0 or highest >= prompt_embeds.shape[0]:
            raise ValueError(
                f"prompt_index runs from {lowest} to {highest}, "
                f"prompt_embeds has rows 0 to {prompt_embeds.shape[0] - 1}"
            )
        if null_embeds is None:
            if config.prompt_dropout > 0.0:
                raise ValueError(f"prompt_dropout = {config.prompt_dropout} needs null_embeds")
            null_embeds = torch.zeros_like(prompt_embeds[0])
        if null_embeds.shape != prompt_embeds.shape[1:]:
            raise InvalidShape(
                f"null_embeds must have shape {tuple(prompt_embeds.shape[1:])}, "
                f"got {tuple(null_embeds.shape)}"
            )
        if config.min_timestep >= len(scheduler.alphas_cumprod):
            raise ValueError(
                f"min_timestep is {config.min_timestep}, the scheduler has timesteps 0 to "
                f"{len(scheduler.alphas_cumprod) - 1}"
            )
        self.config = config
        self.pairs = pairs
        self.alpha_bar = scheduler.alphas_cumprod.detach().double().cpu()
        # The empty prompt is the last row, so dropping a prompt is choosing a row.
        self.embeds = torch.cat([prompt_embeds, null_embeds[None]]).detach()
        self.coefficient = self._coefficients()

    def _coefficients(self) -> Tensor:
        """Return c per timestep, (num_train_steps,) float64; 0 if a timestep is never drawn."""
        constant = dpo_coefficient(self.config.beta_dpo, self.pairs.chosen[0].numel())
        if self.config.snr_weighting == "constant":
            return torch.full_like(self.alpha_bar, constant)
        # Dividing by the mean keeps the meaning of beta_dpo. No step leads on from t = 0.
        omega = snr_weight(self.alpha_bar[1:], self.alpha_bar[:-1], self.config.eta)
        return torch.cat([omega.new_zeros(1), constant * omega / omega.mean()])

    def fingerprint(self) -> dict[str, object]:
        """Return what must agree between a run and its continuation besides the configuration."""
        return {
            "pairs": digest(self.pairs.chosen, self.pairs.rejected, self.pairs.prompt_index),
            "prompt_embeds": digest(self.embeds),
            "alphas_cumprod": digest(self.alpha_bar),
            "prediction_type": self.prediction_type,
        }

    def loss(self, unet: nn.Module, generator: torch.Generator) -> StepDPOLoss:
        """Return the loss of the next batch that `generator` (CPU) draws."""
        n, config = self.config.batch_size, self.config
        first = max(config.min_timestep, 1 if config.snr_weighting == "exact" else 0)
        index = torch.randint(len(self.pairs), (n,), generator=generator)
        t = torch.randint(first, len(self.alpha_bar), (n,), generator=generator)
        is_dropped = torch.rand(n, generator=generator) < config.prompt_dropout
        shape = (n, *self.pairs.chosen.shape[1:])
        noise = torch.randn(shape, generator=generator)
        other = noise if config.shared_noise else torch.randn(shape, generator=generator)

        network = next(unet.parameters())
        place = index.to(self.pairs.chosen.device)
        row = self.pairs.prompt_index[place].cpu().masked_fill(is_dropped, -1)
        embeds = self.embeds[row.repeat(2).to(self.embeds.device)].to(network)
        x_0 = torch.cat([self.pairs.chosen[place], self.pairs.rejected[place]])
        x_0 = x_0.to(network.device, torch.float32)
        eps = torch.cat([noise, other]).to(network.device)
        t = t.repeat(2)
        a = self.alpha_bar[t].float().to(network.device)
        column = a.reshape(-1, *[1] * (x_0.dim() - 1))
        x_t = column.sqrt() * x_0 + (1 - column).sqrt() * eps
        t = t.to(network.device)

        def predict() -> Tensor:
            with torch.autocast(network.device.type, torch.bfloat16, enabled=config.bf16):
                output = unet(x_t.to(network), t, encoder_hidden_states=embeds, return_dict=False)
            return to_epsilon(output[0].float(), x_t, a, self.prediction_type)

        with torch.no_grad(), base_model(unet):
            eps_pre = predict()
        eps_theta = predict()
        coefficient = self.coefficient[t[:n].cpu()].float().to(network.device)
        return step_dpo_loss(
            eps_theta[:n],
            eps_pre[:n],
            eps[:n],
            eps_theta[n:],
            eps_pre[n:],
            eps[n:],
            coefficient=coefficient,
            gamma=config.gamma,
        )
