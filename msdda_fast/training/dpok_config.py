# SPDX-License-Identifier: Apache-2.0
"""The hyper-parameters of a DPOK run: the paper's as defaults, and a preset for small models."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, Literal

_COUNTS = (
    "loops", "num_steps", "prompts_per_loop", "samples_per_prompt", "rollout_batch_size",
    "buffer_size", "policy_steps", "batch_size", "accumulation_steps", "value_batches",
    "value_batch_size", "checkpoint_every",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DPOKConfig:
    """Hyper-parameters of `train_dpok`, validated on construction.

    The defaults are the paper's, for Stable Diffusion 1.5: per loop 6 prompts with one trajectory
    each, a buffer of 1000 transitions, 5 policy steps of 12 x 2 transitions. It ran 8000 loops at
    eta 1.0 (aesthetics) and 0.8 (consistency). `shipped` has values for small models.

    Raises:
        ValueError: A value is out of range; the message names the field.
    """

    loops: int  # rollout and update in all; a finished run may be continued with more
    num_steps: int = 50  # T, denoising steps of a trajectory
    eta: float = 1.0  # in (0, 1], of rollout and log-probability
    trained_steps: int | None = None  # learn from the first of the T steps only; None: from all
    guidance_scale: float = 7.5  # 1: none; sample the result at the same scale
    prompts_per_loop: int = 6  # drawn without repetition
    samples_per_prompt: int = 1  # trajectories of each
    rollout_batch_size: int = 6  # trajectories drawn together
    buffer_size: int = 1000  # transitions kept, the latest; older ones are off-policy
    advantage: Literal["value", "prompt"] = "value"  # r - V; or r against its prompt's mean
    policy_steps: int = 5  # optimiser steps per loop
    batch_size: int = 2  # transitions per forward
    accumulation_steps: int = 12  # forwards per policy step
    lr: float = 1e-5  # of AdamW without weight decay, constant
    reward_weight: float = 1000.0  # w_r
    kl_weight: float = 0.1  # w_kl
    kl: Literal["eps", "exact"] = "eps"  # eps: as published; exact: the KL of Eq. 2, in nats
    clip: float = 1e-4  # c, of the ratio of log-probabilities averaged over dimensions
    grad_clip: float = 0.1  # largest gradient norm, over all parameters
    value_batches: int = 5  # averaged into the loop's one step of the value network
    value_batch_size: int = 256  # transitions each
    value_lr: float = 1e-4  # of AdamW
    mixed_precision: Literal["no", "bf16"] = "no"  # of the networks; log-probabilities are float32
    seed: int = 0  # of prompts, noise, batches and the value network
    checkpoint_every: int = 10  # loops

    @classmethod
    def shipped(cls, **changes: Any) -> DPOKConfig:  # noqa: ANN401 - fields of this class
        """Return the preset for `msdda-fast/emoji` on CPUs: `DPOKConfig.shipped(loops=9, eta=0.8)`.

        On-policy: the buffer is one loop. It learns from the first half of the steps (13 of 25),
        which decide on objects and colours. The advantage is relative to the prompt: most of a
        reward's variance lies between prompts, and the value network would need thousands of
        trajectories to learn that. The KL term is exact; its best weight depends on the reward,
        from 0.02 for one that is hard to raise to 0.2 for one that is easy.
        """
        preset: dict[str, Any] = {
            "num_steps": 25,
            "guidance_scale": 1.0,
            "prompts_per_loop": 8,
            "samples_per_prompt": 6,
            "rollout_batch_size": 48,
            "advantage": "prompt",
            "policy_steps": 3,
            "batch_size": 48,
            "accumulation_steps": 3,
            "lr": 1e-3,
            "kl": "exact",
            "kl_weight": 0.02,
            "grad_clip": 1.0,
            "mixed_precision": "bf16",
        }
        merged = preset | changes
        merged.setdefault("trained_steps", -(-merged["num_steps"] // 2))
        trajectories = merged["prompts_per_loop"] * merged["samples_per_prompt"]
        merged.setdefault("buffer_size", trajectories * merged["trained_steps"])
        return cls(**merged)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            self._require(getattr(self, name) >= 1, name, ">= 1")
        if self.trained_steps is not None:
            is_valid = 1 <= self.trained_steps <= self.num_steps
            self._require(
                is_valid, "trained_steps", f"in [1, num_steps = {self.num_steps}] or None"
            )
        for name in ("lr", "reward_weight", "clip", "grad_clip", "value_lr", "guidance_scale"):
            self._require(0.0 < getattr(self, name) < inf, name, "> 0 and finite")
        self._require(0.0 <= self.kl_weight < inf, "kl_weight", ">= 0 and finite")
        self._require(0.0 < self.eta <= 1.0, "eta", "in (0, 1]")
        self._require(self.kl in ("eps", "exact"), "kl", "eps or exact")
        self._require(self.advantage in ("value", "prompt"), "advantage", "value or prompt")
        self._require(self.mixed_precision in ("no", "bf16"), "mixed_precision", "no or bf16")
        if self.advantage == "prompt" and self.samples_per_prompt < 2:
            raise ValueError(
                "advantage prompt compares the samples of a prompt: samples_per_prompt must be "
                f"at least 2, got {self.samples_per_prompt}"
            )

    def _require(self, is_valid: bool, name: str, accepted: str) -> None:
        if not is_valid:
            raise ValueError(f"{name} must be {accepted}, got {getattr(self, name)!r}")
