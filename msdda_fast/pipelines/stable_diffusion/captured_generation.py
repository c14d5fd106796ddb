# SPDX-License-Identifier: Apache-2.0
"""One request on a captured step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from msdda_fast.engine.graph import CapturedStep
from msdda_fast.errors import InvalidShape
from msdda_fast.pipelines.stable_diffusion.exact import ExactNetwork
from msdda_fast.pipelines.stable_diffusion.merged_network import MergedNetwork
from msdda_fast.pipelines.stable_diffusion.rank_network import RankNetwork
from msdda_fast.steps.coefficients import CoefficientTable

__all__ = ["CapturedGeneration", "CapturedNetwork"]

#: What a captured step runs.
CapturedNetwork: TypeAlias = ExactNetwork | MergedNetwork | RankNetwork


class CapturedGeneration:
    """One loaded request as an `engine.loop.Generation`, with steps in static buffers.

    Attributes:
        forwards: How many networks have run on each image, guidance not counted twice.
    """

    def __init__(
        self,
        step: CapturedStep[CapturedNetwork],
        kinds: Sequence[str],
        shares: Tensor,
        *,
        shares_text: bool,
    ) -> None:
        self._step, self._shares_text, self._kinds = step, shares_text, kinds
        self.forwards = 0
        changes = (shares[1:] != shares[:-1]).flatten(1).any(1).tolist()
        self._reweighted = [False, *changes]  # whether shares change before step k
        self._next = 0

    @property
    def x(self) -> Tensor:
        """The state, (B, C, h, w) float32; the next step overwrites it."""
        return self._step.x

    @property
    def step_kl(self) -> Tensor:
        """Estimated KL divergence of each step from the exact one, (T, B) nats; a copy."""
        return self._estimates(self._step.network.step_kl)

    @property
    def merged_kl(self) -> Tensor:
        """KL divergence of merged steps from exact ones where it was measured, (T, B) nats."""
        return self._estimates(self._step.network.merged_kl)

    def step(self, k: int) -> None:
        """Do step k."""
        if self._reweighted[k]:
            self._step.network.mix(k)
        self._step.step(k)
        self.forwards += self._step.network.forwards[self._kinds[k]]
        self._next = k + 1

    def replace_x(self, x: Tensor) -> None:
        """Continue from another state, between two steps."""
        self._step.buffers.replace_x(x)

    def replace_table(self, table: CoefficientTable) -> None:
        """Continue with other coefficients of the same steps, between two steps."""
        self._step.buffers.replace_table(table)

    def replace_prompt(self, prompt_embeds: Tensor) -> None:
        """Continue with other embeddings (M, K, B, L, D), between two steps.

        Raises:
            InvalidShape: The shape is wrong, or they differ between objectives and did not before.
        """
        buffers = self._step.buffers
        key = buffers.key
        if prompt_embeds.shape != key.context:
            raise InvalidShape(
                f"embeddings have shape {tuple(prompt_embeds.shape)}, expected {key.context}"
            )
        embeds = {m: prompt_embeds[m] for m, runs in enumerate(key.active) if runs}
        first = next(iter(embeds.values()))
        if self._shares_text and not all(bool((rows == first).all()) for rows in embeds.values()):
            raise InvalidShape(
                "the callback returned different embeddings per objective, but all share one text "
                'encoding; use set_forward("sequential")'
            )
        self._step.network.begin(embeds, buffers.timesteps, shared=self._shares_text, k=self._next)

    def _estimates(self, kept: Tensor | None) -> Tensor:
        if kept is None:  # exact networks
            return self.x.new_zeros(len(self._kinds), len(self.x))
        return kept[: len(self._kinds)].clone()
