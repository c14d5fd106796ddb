# SPDX-License-Identifier: Apache-2.0
"""All objectives' outputs from one forward, in place of one forward per objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule
from msdda_fast.pipeline.batched_time import AddedConditions
from msdda_fast.pipeline.batched_unet import BatchedUNet

__all__ = ["BatchedPredictor"]


class BatchedPredictor:
    """`Predictor` for the length of one generation.

    Keys and values of the prompt are kept while `predict` is given the same, unchanged tensor, so
    stack the embeddings before the loop. The steps' flags may change: each set of active objectives
    has its own network, built when first needed.

    Args:
        network: Of all objectives, and current (`network.adapters.is_current()`).
        timesteps: Those of the generation, (T,) int64.
        dtype: Of the outputs.
        added: Stable Diffusion XL's conditions.
    """

    def __init__(
        self,
        network: BatchedUNet,
        timesteps: Tensor,
        dtype: torch.dtype,
        added: AddedConditions | None = None,
    ) -> None:
        self._network = network
        self._timesteps = timesteps
        self._dtype = dtype
        self._added = added
        self._begun: dict[tuple[bool, ...], tuple[Tensor, int, int]] = {}

    @torch.no_grad()
    def predict(
        self, x_t: Tensor, t: Tensor, prompt_embeds: Tensor, active: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """See `Predictor.predict`.

        Raises:
            InvalidSchedule: `t` is none of the timesteps. Only looked up on the CPU; elsewhere such
                a step fails in the device's own index check.
        """
        found = self._timesteps.to(t.device) == t
        if t.device.type == "cpu" and not found.any():
            raise InvalidSchedule(f"t={int(t)} is none of {self._timesteps.tolist()}")
        # without a sync: the index of t, or one past the end
        k = torch.where(found.any(), found.int().argmax(), len(self._timesteps))
        flags = tuple(active) if self._network.options.sharing.inactive else (True,) * len(active)
        network = self._network.subset(flags)
        self._begin(network, flags, prompt_embeds)
        outputs = iter(network(x_t, k).to(self._dtype))
        return [next(outputs) if runs else None for runs in flags]

    def _begin(self, network: BatchedUNet, flags: tuple[bool, ...], prompt_embeds: Tensor) -> None:
        # holding the tensor keeps its identity from being reused
        version = -1 if prompt_embeds.is_inference() else prompt_embeds._version
        seen, *state = self._begun.get(flags, (None, 0, 0))
        # inference tensors count no version, and others may have begun on the same network
        if seen is prompt_embeds and version >= 0 and state == [version, network.generations]:
            return
        chosen = prompt_embeds[list(network.objectives)]
        added = self._added
        if added is not None and len(added.text_embeds) == len(flags):
            index = list(network.objectives)
            added = AddedConditions(added.text_embeds[index], added.time_ids[index])
        if not network.diverges_before_prompt and bool((chosen == chosen[:1]).all()):
            chosen = chosen[:1]  # objectives go on sharing their rows
        network.begin(chosen, self._timesteps, added)
        self._begun[flags] = (prompt_embeds, version, network.generations)
