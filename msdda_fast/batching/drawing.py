# SPDX-License-Identifier: Apache-2.0
"""Batches of strangers drawn by a pipeline: rows put together, padded, sampled, decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from msdda_fast.batched.options import DEFAULTS
from msdda_fast.batching.ticket import Ticket
from msdda_fast.engine.noise import noise_source
from msdda_fast.pipelines.prompts import Prompts
from msdda_fast.pipelines.request import latent_shape
from msdda_fast.pipelines.stable_diffusion import sampling
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.steps.coefficients import CoefficientTable

__all__ = ["BatchPipeline"]

#: `f(step, x_t)`: whether the batch goes on.
Watch: TypeAlias = Callable[[int, Tensor | None], bool]

#: Most shapes of batches kept: four sizes, with and without guidance, of eight sizes of image.
CAPACITY = 64


class BatchPipeline(MSDDAPipeline):
    """A pipeline's modules, seen as what draws batches of tickets; make it with `sharing`.

    Every objective runs in every batch, whatever its weights: an output of weight 0 is masked,
    which is exact, and no request's weights change what has to be captured.
    """

    _watch: Watch
    _x: Tensor | None

    @classmethod
    def sharing(cls, pipe: MSDDAPipeline) -> Self:
        """Share the modules of `pipe`, which stays as it is; one of the two may run at a time."""
        view = cls.from_pipe(pipe)
        settings = {"options": DEFAULTS, **pipe.forward_settings}
        options = settings["options"]
        settings["options"] = replace(options, sharing=replace(options.sharing, inactive=False))
        view.set_forward(**settings)
        view._sampler_options = {**view._sampler_options, "capacity": CAPACITY}
        return view

    @torch.no_grad()
    def sample(self, batch: Sequence[Ticket], *, size: int, watch: Watch) -> Tensor:
        """Draw latents for a batch of one shape.

        Args:
            batch: B tickets; rows of the last one fill it up to `size`.
            size: >= B.
            watch: Called after each step with its number 1..T, and with the state (size, C, h, w)
                if somebody in the batch wants previews; False ends the batch there.

        Returns: x_0 (B, C, h, w), or the state after the last step that was done.
        """
        rows = [*batch, *[batch[-1]] * (size - len(batch))]
        device = self._execution_device
        table = _side_by_side([ticket.table for ticket in rows]).to(device)
        prompts = Prompts.check(
            [ticket.prompt for ticket in rows],
            [ticket.negative_prompt for ticket in rows],
            None,
            None,
            images_per_prompt=1,
            embed_width=self.unet.config.cross_attention_dim,
        )
        height, width, _ = batch[0].shape
        shape = latent_shape(size, self.unet.config, self.vae_scale_factor, height, width)
        seeds = [ticket.seed for ticket in rows]
        noise = noise_source(shape, len(table), device, seeds=seeds)
        self._watch, self._x = watch, None
        looks = _keep if any(ticket.preview_steps for ticket in batch) else None
        callback = sampling.Callback(looks, ("latents",))
        x, _ = sampling.sample(self, prompts, table, noise, None, callback)
        return x[: len(batch)]

    @torch.no_grad()
    def decode(self, x_0: Tensor, output_type: str) -> tuple[Sequence[Any], Sequence[bool]]:
        """Return B images, and whether the safety checker blackened each."""
        images, flagged = self._decode(x_0, output_type)
        self.maybe_free_model_hooks()
        return images, [False] * len(x_0) if flagged is None else flagged

    @torch.no_grad()
    def preview(self, x_t: Tensor, output_type: str) -> Sequence[Any]:
        """Return B images of states (B, C, h, w); the safety checker sees them, too."""
        images, _ = self._decode(x_t, output_type)  # frees no hooks: the networks go on
        return list(images)

    @contextmanager
    def progress_bar(
        self,
        iterable: object = None,
        total: int | None = None,
    ) -> Iterator[_Steps]:
        """What sampling tells its steps to: no bar, but whoever watches the batch."""
        yield _Steps(self)


class _Steps:
    """Counts steps, and ends the batch when nobody wants it any more."""

    def __init__(self, pipe: BatchPipeline) -> None:
        self._pipe, self._done = pipe, 0

    def update(self) -> None:
        self._done += 1
        if not self._pipe._watch(self._done, self._pipe._x):
            self._pipe._interrupt = True


def _keep(pipe: BatchPipeline, k: int, t: Tensor, tensors: dict[str, Any]) -> None:
    pipe._x = tensors["latents"]


def _side_by_side(tables: Sequence[CoefficientTable]) -> CoefficientTable:
    """One table (T, B, C) of B tables (T, 1, C) of the same steps."""
    return replace(
        tables[0],
        rows=torch.cat([table.rows for table in tables], dim=1),
        share=torch.cat([table.share for table in tables], dim=1),
        std=torch.cat([table.std for table in tables], dim=1),
        needs_uncond=any(table.needs_uncond for table in tables),
    )
