# SPDX-License-Identifier: Apache-2.0
"""One forward of merged adapters for all objectives, with an estimate of its error.

A step of kind "both" compares the merged network's output with the exact one. That difference is
the estimated error of the merged steps until the next such step. All data that one step passes to
another is in storage that is written in place, so that each kind of step can be captured.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.buffers import ShapeKey, StepBuffers
from msdda_fast.engine.step import Predict
from msdda_fast.pipelines.stable_diffusion.merged_unet import MergedUNet
from msdda_fast.pipelines.stable_diffusion.step_kl import step_kl
from msdda_fast.steps.coefficients import CoefficientTable, StepCoefficients

__all__ = ["MergedNetwork"]


class MergedNetwork:
    """`engine.step.Network` of the approximate modes, for requests of one shape.

    For the kinds of step see `modes`. Embeddings that differ between objectives are averaged with
    the same shares as the adapters.

    Args:
        exact: Exact forward of the objectives that run.
        key: Shapes of the requests.
        buffers: Buffers of the step; "std", "share" and "exact" are added to their `conditioning`.

    Attributes:
        step_kl: Estimated KL divergence of each step from the exact one, (T, B) nats; written by
            steps that are not exact. See `step_kl.step_kl`.
        merged_kl: Measured KL divergence of the merged step from the exact one, (T, B) nats;
            written by steps of kind "both".

    Raises:
        UnsupportedNetwork: The adapters cannot be merged per sample.
    """

    def __init__(self, exact: BatchedUNet, key: ShapeKey, buffers: StepBuffers) -> None:
        self._exact, self._key, self._buffers = exact, key, buffers
        self._merged = MergedUNet(exact.adapters)
        size, x = (key.max_steps, key.shape[0]), buffers.x
        self.step_kl, self.merged_kl = x.new_zeros(size), x.new_zeros(size)
        self._std = buffers.conditioning["std"] = x.new_zeros(size)
        self._is_exact = x.new_zeros(size, dtype=torch.bool)
        buffers.conditioning["exact"] = self._is_exact
        self._share = buffers.conditioning["share"] = x.new_zeros(*size, len(key.active))
        self._errors = x.new_zeros(len(exact.objectives), key.branches, *x.shape)
        self._begun: tuple[Tensor, Tensor] | None = None  # embeddings and timesteps

    @property
    def kinds(self) -> Mapping[str, Predict]:
        """The kinds of step by name."""
        return {"exact": self._predict, "both": self._compare, "merged": self._approximate}

    @property
    def forwards(self) -> Mapping[str, int]:
        """How many networks each kind of step runs on an image."""
        count = len(self._exact.objectives)
        return {"exact": count, "both": count + 1, "merged": 1}

    def storages(self) -> Mapping[str, Tensor]:
        """Return the tensors of both networks, the estimated errors and the estimates of KL."""
        merged = {f"merged.{name}": tensor for name, tensor in self._merged.storages().items()}
        kept = {"errors": self._errors, "step_kl": self.step_kl, "merged_kl": self.merged_kl}
        return {**self._exact.storages(), **merged, **kept}

    def conditioning(self, table: CoefficientTable, exact: Tensor) -> dict[str, Tensor]:
        """Reset the estimates, and return the conditioning to load for this request.

        Args:
            table: T steps.
            exact: As in `StepPlan`, (T, B).
        """
        for kept in (self.step_kl, self.merged_kl, self._errors):
            kept.zero_()
        rows = self._key.max_steps - len(table)
        return {
            "share": functional.pad(table.share, (0, 0, 0, 0, 0, rows)),
            "exact": functional.pad(exact, (0, 0, 0, rows)),
            "std": functional.pad(table.std, (0, 0, 0, rows)),
        }

    def begin(
        self, embeds: Mapping[int, Tensor], timesteps: Tensor, *, shared: bool, k: int
    ) -> None:
        """Set the prompts from step k on; arguments as in `ExactNetwork.begin`."""
        rows = [embeds[m] for m in self._exact.objectives]
        prompt_embeds = torch.stack(rows[:1] if shared else rows)
        self._exact.begin(prompt_embeds, timesteps)
        self._begun = prompt_embeds, timesteps
        self.mix(k)

    def mix(self, k: int) -> None:
        """Merge with the shares of step k, in place and without a sync."""
        assert self._begun is not None  # begin() has been called
        embeds, timesteps = self._begun
        shares = self._share[k]
        unused = len(self._merged.adapters.variants) - shares.shape[1]  # the base, often
        self._merged.mix(functional.pad(shares, (0, unused)))
        if len(embeds) > 1:
            own = torch.stack([shares[:, m] for m in self._exact.objectives])
            embeds = (own.to(embeds)[:, None, :, None, None] * embeds).sum(0, keepdim=True)
        self._merged.begin(embeds, timesteps)

    def _predict(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
        return self._spread(self._exact(next_input[0], k))

    def _compare(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
        outputs = self._exact(next_input[0], k)
        merged = self._merge(next_input, k)
        self._errors.copy_(outputs.to(self._errors) - merged.to(self._errors))
        at = k[None]
        exact, kl = self._is_exact.index_select(0, at)[0], self._divergence(merged, k)
        self.merged_kl.index_copy_(0, at, kl[None])
        self.step_kl.index_copy_(0, at, kl.masked_fill(exact, 0.0)[None])
        return self._spread(torch.where(exact[:, None, None, None], outputs, merged))

    def _approximate(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
        outputs = self._merge(next_input, k)
        self.step_kl.index_copy_(0, k[None], self._divergence(outputs, k)[None])
        return self._spread(outputs)

    def _merge(self, next_input: Tensor, k: Tensor) -> Tensor:
        count = len(self._exact.objectives)
        outputs: Tensor = self._merged(next_input[0], k)
        return outputs.expand(count, -1, -1, -1, -1, -1)

    def _divergence(self, outputs: Tensor, k: Tensor) -> Tensor:
        """Return the KL, (B,), of the step on the merged outputs, if errors are as known now."""
        x, at = self._buffers.x, k[None]
        row = self._buffers.rows.index_select(0, at)[0]
        wide = outputs.to(x)
        return step_kl(
            x,
            self._spread(wide),
            self._spread(wide + self._errors),
            StepCoefficients(row, len(self._key.active), self._key.clip_range),
            self._std.index_select(0, at)[0],
        )

    def _spread(self, outputs: Tensor) -> list[Tensor | None]:
        """Return the outputs of the active objectives at their positions among all M."""
        found = dict(zip(self._exact.objectives, outputs, strict=True))
        return [found.get(m) for m in range(len(self._key.active))]
