# SPDX-License-Identifier: Apache-2.0
"""The batched forward of the objectives as a network of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from msdda_fast.batched.rows import Rows
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.side_by_side import SideBySide

__all__ = ["ActiveObjectives", "storages"]


def storages(unet: BatchedUNet) -> dict[str, Tensor]:
    """Weights, factors, keys and values of the prompt, time embeddings."""
    named = dict(unet.named_parameters()) | dict(unet.named_buffers())
    for path, module in unet.named_modules():
        for name, value in vars(module).items():
            alone = isinstance(value, Rows) or not isinstance(value, tuple)
            rows = [entry for entry in ([value] if alone else value) if isinstance(entry, Rows)]
            named |= {f"{path}.{name}.{i}": entry.x for i, entry in enumerate(rows)}
    return named


class _OneNetwork:
    """`engine.step.Network` over the batched forward of the objectives that share a network."""

    def __init__(self, unet: BatchedUNet, dtype: torch.dtype) -> None:
        self._unet = unet
        self._dtype = dtype

    def __call__(self, next_input: Tensor, k: Tensor, /) -> Tensor:
        """See `engine.step.Network`; the network makes its own rows, so R = 1."""
        outputs: Tensor = self._unet(next_input[0], k)
        return outputs.to(self._dtype)

    def storages(self) -> Mapping[str, Tensor]:
        return storages(self._unet)


class ActiveObjectives:
    """`engine.step.Network` of all objectives: those of one network in one forward.

    Args:
        members: By network, its batched forward and the objectives that it runs.
        count: M; the others have no output.
        dtype: Of the outputs.
    """

    def __init__(
        self, members: Sequence[tuple[BatchedUNet, Sequence[int]]], count: int, dtype: torch.dtype
    ) -> None:
        self._members = members
        self._count = count
        self._side_by_side = SideBySide([_OneNetwork(unet, dtype) for unet, _ in members])

    def begin(self, embeds: Mapping[int, Tensor], timesteps: Tensor, *, shared: bool) -> None:
        """Start a generation; see `BatchedUNet.begin`.

        Args:
            embeds: (K, B, L, D) by active objective.
            timesteps: (T,) int64.
            shared: Whether they are the same for all objectives.
        """
        for unet, objectives in self._members:
            rows = [embeds[m] for m in objectives]
            unet.begin(torch.stack(rows[:1] if shared else rows), timesteps)

    def __call__(self, next_input: Tensor, k: Tensor, /) -> list[Tensor | None]:
        """See `engine.step.Network`."""
        outputs: list[Tensor | None] = [None] * self._count
        order = [m for _, objectives in self._members for m in objectives]
        for m, output in zip(order, self._side_by_side(next_input, k), strict=True):
            outputs[m] = output
        return outputs

    def storages(self) -> Mapping[str, Tensor]:
        """See `engine.step.Network`."""
        return self._side_by_side.storages()
