# SPDX-License-Identifier: Apache-2.0
"""Batches drawn by the captured Stable Diffusion: put together, padded, sampled and decoded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from msdda_fast.batching.drawer import Drawn, Watcher
from msdda_fast.batching.ticket import Ticket
from msdda_fast.engine.noise import noise_source
from msdda_fast.pipelines.prompts import Prompts
from msdda_fast.pipelines.request import latent_shape
from msdda_fast.pipelines.stable_diffusion.forward import Runner
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.pipelines.stable_diffusion.sampling import PromptedGeneration, Request, sample
from msdda_fast.steps.coefficients import CoefficientTable
from msdda_fast.steps.side_by_side import side_by_side

__all__ = ["BatchDrawer"]

#: Most shapes of batches kept: four sizes, with and without guidance, of eight sizes of image.
CAPACITY = 64


class BatchDrawer:
    """Draws batches of tickets with the modules of a pipeline.

    Every objective runs in every batch, whatever its weights: an output of weight 0 is masked,
    which is exact, so weights never require a new capture.

    Args:
        pipe: Not changed.

    Raises:
        ValueError: Several processes share it.

    Attributes:
        pipe: A pipeline over the same modules, with a scheduler of its own.
    """

    def __init__(self, pipe: MSDDAPipeline) -> None:
        if pipe.parallel is not None:
            raise ValueError("an engine runs in one process: call disable_parallel() first")
        self.pipe = MSDDAPipeline.from_pipe(pipe)
        self.restart()

    def restart(self) -> None:
        """Give up every buffer and graph; the next batch builds them again."""
        settings = self.pipe.forward_settings
        sharing = replace(settings.options.sharing, inactive=False)
        options = replace(settings.options, sharing=sharing)
        self._runner = Runner(replace(settings, options=options), capacity=CAPACITY)

    @property
    def device(self) -> torch.device:
        """The device that batches are drawn on."""
        device: torch.device = self.pipe._execution_device
        return device

    def shared_networks(self) -> Iterable[nn.Module | None]:
        """The networks that a batch uses."""
        return self.pipe.shared_networks()

    def draw(
        self, batch: Sequence[Ticket], *, size: int, watch: Watcher, output_type: str
    ) -> Sequence[Drawn | None] | None:
        """Draw a batch; see `Drawer`. What is not finite is not decoded."""
        goes_on = True

        def watched(step: int, steps: int, x_t: Tensor | None) -> bool:
            nonlocal goes_on
            goes_on = watch(step, steps, x_t)
            return goes_on

        x_0 = self.sample(batch, size=size, watch=watched)
        if not goes_on:
            return None
        finite = x_0.isfinite().flatten(1).all(1)
        if not finite.any():
            return [None] * len(batch)
        images, flags = self.decode(x_0 if finite.all() else x_0[finite], output_type)
        drawn = iter([Drawn(*pair) for pair in zip(images, flags, strict=True)])
        return [next(drawn) if is_finite else None for is_finite in finite.tolist()]

    def warm(self, ticket: Ticket, size: int, output_type: str) -> None:
        """Do one step of a batch of `size` copies of a ticket, and decode the result."""
        x = self.sample([ticket] * size, size=size, watch=lambda *_: False)
        self._runner.keep_faster()
        self.decode(x, output_type)

    @torch.no_grad()
    def sample(self, batch: Sequence[Ticket], *, size: int, watch: Watcher) -> Tensor:
        """Draw latents for a batch of tickets of one shape.

        Args:
            batch: B tickets; copies of the last one pad the batch to `size`.
            size: Batch size to compute, >= B.
            watch: Called after each step, see `Watcher`; returning False ends the batch.

        Returns: x_0 (B, C, h, w), or the state after the last step done.
        """
        rows = [*batch, *[batch[-1]] * (size - len(batch))]
        pipe = self.pipe
        networks = pipe.networks(with_base=batch[0].shape.with_base, runner=self._runner)
        device = networks.device
        table = side_by_side([_table(ticket) for ticket in rows]).to(device)
        prompts = Prompts.check(
            [ticket.prompt for ticket in rows],
            [ticket.negative_prompt for ticket in rows],
            None,
            None,
            images_per_prompt=1,
            embed_width=pipe.unet.config.cross_attention_dim,
        )
        height, width = batch[0].shape[:2]
        shape = latent_shape(size, pipe.unet.config, pipe.vae_scale_factor, height, width)
        seeds = [ticket.seed for ticket in rows]
        noise = noise_source(shape, len(table), device, seeds=seeds)
        looks = any(ticket.preview_steps for ticket in batch)

        def watched(k: int, generation: PromptedGeneration, embeds: Tensor) -> bool:
            return watch(k + 1, len(table), generation.x.clone() if looks else None)

        done = sample(networks, Request(prompts, table, noise), watched)
        return done.x[: len(batch)]

    @torch.no_grad()
    def decode(self, x_0: Tensor, output_type: str) -> tuple[Sequence[Any], Sequence[bool]]:
        """Return B images, and for each whether the safety checker blackened it."""
        images, flagged = self.pipe.to_images(x_0, output_type)
        self.pipe.maybe_free_model_hooks()
        return images, [False] * len(x_0) if flagged is None else flagged

    @torch.no_grad()
    def preview(self, x_t: Tensor, output_type: str) -> Sequence[Any]:
        """Return B images of states (B, C, h, w), also passed through the safety checker."""
        images, _ = self.pipe.to_images(x_t, output_type)  # frees no hooks: the networks go on
        return list(images)


def _table(ticket: Ticket) -> CoefficientTable:
    assert ticket.table is not None
    return ticket.table
