# SPDX-License-Identifier: Apache-2.0
"""The hyper-parameters of a reward-gradient run."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardGradientConfig:
    """Hyper-parameters of `train_reward_gradient`, validated on construction.

    Raises:
        ValueError: A value is out of range; the message names the field.
    """

    steps: int  # optimiser steps in all; a finished run may be continued with more
    level: float = 1.0  # noise of the policy, as the rule reads it: DDIM's eta, Flow-GRPO's a
    kl_weight: float = 0.05  # lambda >= 0, reward per nat of path KL to the base
    timesteps: tuple[float, float] | None = None  # the adapter acts from low to high; None: always
    guidance_scale: float = 1.0  # 1: none; sample the result at the same scale
    batch_size: int = 16  # trajectories per optimiser step
    scored_steps: int = 3  # steps of each trajectory with reward and gradient
    lr: float = 1e-3  # of AdamW without weight decay, constant
    grad_clip: float = 1.0  # largest gradient norm, over all parameters
    mixed_precision: Literal["no", "bf16"] = "no"  # of the network; reward and KL are float32
    seed: int = 0  # of prompts, noise and scored steps
    checkpoint_every: int = 20  # optimiser steps

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "scored_steps", "checkpoint_every"):
            self._require(getattr(self, name) >= 1, name, ">= 1")
        for name in ("lr", "grad_clip", "guidance_scale", "level"):
            self._require(0.0 < getattr(self, name) < inf, name, "> 0 and finite")
        self._require(0.0 <= self.kl_weight < inf, "kl_weight", ">= 0 and finite")
        self._require(self.mixed_precision in ("no", "bf16"), "mixed_precision", "no or bf16")
        if self.timesteps is not None:
            low, high = self.timesteps
            self._require(0.0 <= low <= high < inf, "timesteps", "(low, high), 0 <= low <= high")
            object.__setattr__(self, "timesteps", (float(low), float(high)))  # a list, a JSON's

    def _require(self, is_valid: bool, name: str, accepted: str) -> None:
        if not is_valid:
            raise ValueError(f"{name} must be {accepted}, got {getattr(self, name)!r}")
