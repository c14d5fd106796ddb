# SPDX-License-Identifier: Apache-2.0
"""The hyper-parameters of a step-level DPO run."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDPOConfig:
    """Hyper-parameters of `train_step_dpo`, validated on construction.

    Raises:
        ValueError: A value is out of range; the message names the field.
    """

    steps: int  # optimiser steps in all; a finished run may be continued with more
    lr: float = 2e-4  # of AdamW without weight decay; constant after the warm-up
    batch_size: int = 16  # pairs per step, i.e. 2 x batch_size latents
    beta_dpo: float = 5000.0  # c = beta_dpo / (2 d) with d latent dimensions
    gamma: float = 1.0  # in [0, 1]: 1 the paper's loss, 0 Diffusion-DPO
    shared_noise: bool = True  # same noise for chosen and rejected; False as Eq. 4 is written
    snr_weighting: Literal["constant", "exact"] = "constant"  # exact: c omega_t / mean(omega)
    eta: float = 1.0  # in (0, 1], of the exact weight only: the eta the samples were drawn with
    min_timestep: int = 0  # t is uniform from here up; what an image shows is settled at high t
    prompt_dropout: float = 0.0  # probability per pair, in [0, 1), that both see the empty prompt
    warmup_steps: int = 0  # steps of linear rise from 0 to lr
    grad_clip: float = 1.0  # largest gradient norm, over all parameters
    ema_decay: float = 0.0  # in [0, 1); 0: off, else the saved adapter is the moving average
    bf16: bool = False  # bfloat16 autocast of the network; the loss is float32 either way
    seed: int = 0  # of pairs, timesteps, noise and dropout
    log_every: int = 1  # steps
    checkpoint_every: int = 100  # steps

    def __post_init__(self) -> None:
        self._require(
            self.snr_weighting in ("constant", "exact"), "snr_weighting", "constant or exact"
        )
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            self._require(getattr(self, name) >= 1, name, ">= 1")
        for name in ("warmup_steps", "min_timestep"):
            self._require(getattr(self, name) >= 0, name, ">= 0")
        for name in ("lr", "beta_dpo", "grad_clip"):
            self._require(0.0 < getattr(self, name) < inf, name, "> 0 and finite")
        self._require(0.0 <= self.gamma <= 1.0, "gamma", "in [0, 1]")
        self._require(0.0 < self.eta <= 1.0, "eta", "in (0, 1]")
        for name in ("prompt_dropout", "ema_decay"):
            self._require(0.0 <= getattr(self, name) < 1.0, name, "in [0, 1)")

    def _require(self, is_valid: bool, name: str, accepted: str) -> None:
        if not is_valid:
            raise ValueError(f"{name} must be {accepted}, got {getattr(self, name)!r}")
