# SPDX-License-Identifier: Apache-2.0
"""The exact outputs of all objectives; those that share a network share its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.side_by_side import SideBySide

__all__ = ["ExactNetwork"]


class ExactNetwork:
    """`engine.step.Network` with one kind of step, "exact".

    Args:
        members: The batched forward of each network, and the objectives that it runs.
        count: M; objectives that no member runs have no output.
        dtype: Dtype of the outputs.
    """

    step_kl: None = None

    def __init__(
        self, members: Sequence[tuple[BatchedUNet, Sequence[int]]], count: int, dtype: torch.dtype
    ) -> None:
        self._members, self._count = members, count
        self._side_by_side = SideBySide([partial(_outputs, unet, dtype) for unet, _ in members])

    @property
    def kinds(self) -> Mapping[str, Callable[[Tensor, Tensor], list[Tensor | None]]]:
        """The one kind of step."""
        return {"exact": self._predict}

    def storages(self) -> Mapping[str, Tensor]:
        """Return the tensors of every member i, with names that start with "i."."""
        return {
            f"{i}.{name}": tensor
            for i, (unet, _) in enumerate(self._members)
            for name, tensor in unet.storages().items()
        }

    def begin(
        self, embeds: Mapping[int, Tensor], timesteps: Tensor, *, shared: bool, k: int
    ) -> None:
        """Set the prompts of a request, at its start or between two steps; see `BatchedUNet.begin`.

        Args:
            embeds: (K, B, L, D) by active objective.
            timesteps: (T,) int64.
            shared: Whether the embeddings are the same for all objectives.
            k: The next step; not used here.
        """
        for unet, objectives in self._members:
            rows = [embeds[m] for m in objectives]
            unet.begin(torch.stack(rows[:1] if shared else rows), timesteps)

    def mix(self, k: int) -> None:
        """Do nothing: shares do not affect exact networks."""

    def _predict(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
        outputs: list[Tensor | None] = [None] * self._count
        order = [m for _, objectives in self._members for m in objectives]
        for m, output in zip(order, self._side_by_side(next_input, k), strict=True):
            outputs[m] = output
        return outputs


def _outputs(unet: BatchedUNet, dtype: torch.dtype, next_input: Tensor, k: Tensor) -> Tensor:
    outputs: Tensor = unet(next_input[0], k)  # the network makes its own rows, so R = 1
    return outputs.to(dtype)
