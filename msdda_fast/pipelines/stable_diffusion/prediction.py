# SPDX-License-Identifier: Apache-2.0
"""The seam between sampling and networks: all objectives' outputs for one latent and timestep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from msdda_fast.adapters.switching import AdapterSwitch
from msdda_fast.adapters.variant import Variant

__all__ = ["Predictor", "SequentialPredictor"]


class Predictor(Protocol):
    """Evaluates every objective; whoever implements it chooses how many forwards that takes."""

    def predict(
        self, x_t: Tensor, t: Tensor, prompt_embeds: Tensor, active: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Return the raw outputs of M objectives, before guidance.

        Args:
            x_t: (B, C, H, W) latents in the state dtype.
            t: Timestep, 0-d int64 on the device of `x_t`.
            prompt_embeds: (M, K, B, L, D); K = 2 holds (uncond, cond), K = 1 cond alone.
            active: M flags; the outputs of the others will not be read.

        Returns: M items (K, B, C, H, W) of one dtype, or an (M, K, B, C, H, W) tensor; None for an
            objective that was not evaluated.
        """


class SequentialPredictor:
    """Active objectives one after another, switching adapters in between.

    Args:
        variants: M networks, one per objective; they may be the same module.
        switch: Has the adapters of every network, and has been entered.
        dtype: Of the outputs.
    """

    def __init__(
        self, variants: Sequence[Variant], switch: AdapterSwitch, dtype: torch.dtype
    ) -> None:
        self._variants = variants
        self._switch = switch
        self._dtype = dtype

    def predict(
        self, x_t: Tensor, t: Tensor, prompt_embeds: Tensor, active: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """See `Predictor.predict`."""
        return [
            self._run(variant, x_t, t, embeds) if is_active else None
            for variant, embeds, is_active in zip(
                self._variants, prompt_embeds, active, strict=True
            )
        ]

    def _run(self, variant: Variant, x_t: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        self._switch.select(variant.adapter, variant.scale)
        network = variant.network
        branches = embeds.shape[:2]  # (K, B)
        output: Tensor = network(
            x_t.to(network.dtype).repeat(branches[0], 1, 1, 1),
            t,
            encoder_hidden_states=embeds.flatten(0, 1).to(network.dtype),
            return_dict=False,
        )[0].to(self._dtype)
        return output.view(*branches, *x_t.shape[1:])
