# SPDX-License-Identifier: Apache-2.0
"""One forward of merged adapters for all objectives, with an estimate of its error.

A step of kind "both" compares the merged network's output with the exact one. That difference is
the estimated error of the merged steps until the next such step. All data that one step passes to
another is in storage that is written in place, so that each kind of step can be captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.buffers import ShapeKey, StepBuffers
from msdda_fast.engine.step import Predict
from msdda_fast.pipelines.stable_diffusion.exact import step_kind
from msdda_fast.pipelines.stable_diffusion.merged_unet import MergedUNet
from msdda_fast.pipelines.stable_diffusion.modes import StepPlan
from msdda_fast.pipelines.stable_diffusion.step_kl import step_kl
from msdda_fast.steps.coefficients import CoefficientTable, StepCoefficients

__all__ = ["MergedNetwork"]


class MergedNetwork:
    """`engine.step.Network` of the approximate modes, for requests of one shape.

    For the kinds of step see `modes`; "exact" and "both" are followed by the objectives that run,
    see `exact.step_kind`. Embeddings that differ between objectives are averaged with the same
    shares as the adapters.

    Args:
        exact: By the objectives that steps run, as flags, the exact forward of these.
        key: Shapes of the requests.
        buffers: Buffers of the step; "std", "share" and "exact" are added to their `conditioning`.

    Attributes:
        step_kl: Estimated KL divergence of each step from the exact one, (T, B) nats; written by
            steps that are not exact. See `step_kl.step_kl`.
        merged_kl: Measured KL divergence of the merged step from the exact one, (T, B) nats;
            written by steps of kind "both".
        kinds: The kinds of step by name.
        forwards: How many networks each kind of step runs on an image.

    Raises:
        UnsupportedNetwork: The adapters cannot be merged per sample.
    """

    def __init__(
        self, exact: Mapping[tuple[bool, ...], BatchedUNet], key: ShapeKey, buffers: StepBuffers
    ) -> None:
        self._exact, self._key, self._buffers = list(exact.values()), key, buffers
        self._merged = MergedUNet(self._exact[0].adapters)
        self._active = [m for m, runs in enumerate(key.active) if runs]
        size, x = (key.max_steps, key.shape[0]), buffers.x
        self.step_kl, self.merged_kl = x.new_zeros(size), x.new_zeros(size)
        self._std = buffers.conditioning["std"] = x.new_zeros(size)
        self._is_exact = x.new_zeros(size, dtype=torch.bool)
        buffers.conditioning["exact"] = self._is_exact
        self._share = buffers.conditioning["share"] = x.new_zeros(*size, len(key.active))
        self._errors = x.new_zeros(len(self._active), key.branches, *x.shape)
        self._begun: tuple[Tensor, Tensor] | None = None  # embeddings and timesteps
        self.kinds: dict[str, Predict] = {"merged": self._approximate}
        self.forwards = {"merged": 1}
        for runs, unet in exact.items():
            count = len(unet.objectives)
            self.kinds[step_kind("exact", runs)] = partial(self._predict, unet)
            self.forwards[step_kind("exact", runs)] = count
            if count > 1:  # one alone is not merged with anything
                self.kinds[step_kind("both", runs)] = partial(self._compare, unet)
                self.forwards[step_kind("both", runs)] = count + 1

    def storages(self) -> Mapping[str, Tensor]:
        """Return the tensors of all networks, the estimated errors and the estimates of KL."""
        networks = {"merged": self._merged} | {str(i): unet for i, unet in enumerate(self._exact)}
        kept = {"errors": self._errors, "step_kl": self.step_kl, "merged_kl": self.merged_kl}
        return kept | {
            f"{network}.{name}": tensor
            for network, unet in networks.items()
            for name, tensor in unet.storages().items()
        }

    def conditioning(self, table: CoefficientTable, plan: StepPlan) -> dict[str, Tensor]:
        """Reset the estimates, and return the conditioning to load for this request.

        Args:
            table: T steps.
            plan: Of the same steps.
        """
        for kept in (self.step_kl, self.merged_kl, self._errors):
            kept.zero_()
        rows = self._key.max_steps - len(table)
        return {
            "share": functional.pad(plan.shares, (0, 0, 0, 0, 0, rows)),
            "exact": functional.pad(plan.exact, (0, 0, 0, rows)),
            "std": functional.pad(table.std, (0, 0, 0, rows)),
        }

    def begin(
        self, embeds: Mapping[int, Tensor], timesteps: Tensor, *, shared: bool, k: int
    ) -> None:
        """Set the prompts from step k on; arguments as in `ExactNetwork.begin`."""

        def rows(objectives: Sequence[int]) -> Tensor:
            return torch.stack([embeds[m] for m in objectives[: 1 if shared else None]])

        for unet in self._exact:
            unet.begin(rows(unet.objectives), timesteps)
        self._begun = rows(self._active), timesteps
        self.mix(k)

    def mix(self, k: int) -> None:
        """Merge with the shares of step k, in place and without a sync."""
        assert self._begun is not None  # begin() has been called
        embeds, timesteps = self._begun
        shares = self._share[k]
        unused = len(self._merged.adapters.variants) - shares.shape[1]  # the base, often
        self._merged.mix(functional.pad(shares, (0, unused)))
        if len(embeds) > 1:
            own = torch.stack([shares[:, m] for m in self._active])
            embeds = (own.to(embeds)[:, None, :, None, None] * embeds).sum(0, keepdim=True)
        self._merged.begin(embeds, timesteps)

    def _predict(self, unet: BatchedUNet, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
        return self._spread(unet(next_input[0], k), unet.objectives)

    def _compare(self, unet: BatchedUNet, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
        outputs: Tensor = unet(next_input[0], k)
        merged: Tensor = self._merged(next_input[0], k).expand_as(outputs)
        for m, output, other in zip(unet.objectives, outputs, merged, strict=True):
            error = self._errors[self._active.index(m)]
            error.copy_(output.to(error) - other.to(error))
        at = k[None]
        exact = self._is_exact.index_select(0, at)[0]
        kl = self._divergence(merged, outputs, unet.objectives, k)
        self.merged_kl.index_copy_(0, at, kl[None])
        self.step_kl.index_copy_(0, at, kl.masked_fill(exact, 0.0)[None])
        chosen = torch.where(exact[:, None, None, None], outputs, merged)
        return self._spread(chosen, unet.objectives)

    def _approximate(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
        outputs: Tensor = self._merged(next_input[0], k)
        outputs = outputs.expand(len(self._active), -1, -1, -1, -1, -1)
        right = outputs.to(self._errors) + self._errors  # as far as errors are as at the last look
        kl = self._divergence(outputs, right, self._active, k)
        self.step_kl.index_copy_(0, k[None], kl[None])
        return self._spread(outputs, self._active)

    def _divergence(
        self, outputs: Tensor, others: Tensor, objectives: Sequence[int], k: Tensor
    ) -> Tensor:
        """Return the KL, (B,), of the step on these outputs from the step on others."""
        x, at = self._buffers.x, k[None]
        row = self._buffers.rows.index_select(0, at)[0]
        return step_kl(
            x,
            self._spread(outputs.to(x), objectives),
            self._spread(others.to(x), objectives),
            StepCoefficients(row, len(self._key.active), self._key.clip_range),
            self._std.index_select(0, at)[0],
        )

    def _spread(self, outputs: Tensor, objectives: Sequence[int]) -> list[Tensor | None]:
        """Return the outputs of some objectives at their positions among all M."""
        found = dict(zip(objectives, outputs, strict=True))
        return [found.get(m) for m in range(len(self._key.active))]
