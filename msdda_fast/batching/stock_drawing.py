# SPDX-License-Identifier: Apache-2.0
"""Batches drawn by stock pipelines with objectives: one call of the pipeline each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from msdda_fast.batching.drawer import Drawn, Watcher
from msdda_fast.batching.ticket import StockImage, Ticket
from msdda_fast.pipelines.attach import WithObjectives, attach
from msdda_fast.pipelines.capabilities import Capabilities
from msdda_fast.pipelines.images import pictures

__all__ = ["StockDrawer"]

#: Steps of a call that only warms up: with one, solvers of second order never get to their second.
_WARM_STEPS = 2


class _Ended(Exception):
    """Nobody waits for the batch any more."""


class StockDrawer:
    """Draws batches of tickets by calls of a stock pipeline with objectives.

    An objective that no image of a batch has a weight for does not run.

    Args:
        pipe: Not changed.

    Raises:
        ValueError: Several processes share it.

    Attributes:
        pipe: A pipeline over the same modules.
    """

    def __init__(self, pipe: WithObjectives) -> None:
        if pipe.parallel is not None:
            raise ValueError("an engine runs in one process: call disable_parallel() first")
        self._source, self._takes = pipe, Capabilities.of(pipe)
        self.pipe: Any = pipe
        self.restart()

    @property
    def device(self) -> torch.device:
        """The device that batches are drawn on."""
        device: torch.device = self.pipe._execution_device
        return device

    def shared_networks(self) -> Iterable[nn.Module | None]:
        """The networks that a batch uses."""
        networks: list[nn.Module] = self.pipe.shared_networks()
        return networks

    def restart(self) -> None:
        """Give up whatever was built for the networks; the next call builds it again."""
        self.pipe = attach(self._source)
        self.pipe.set_progress_bar_config(disable=True)

    def draw(
        self, batch: Sequence[Ticket], *, size: int, watch: Watcher, output_type: str
    ) -> Sequence[Drawn | None] | None:
        """Draw a batch; see `Drawer`."""
        return self._call(batch, size, watch, output_type, batch[0].shape.steps)

    def warm(self, ticket: Ticket, size: int, output_type: str) -> None:
        """Draw a batch of `size` copies of a ticket in few steps."""
        strength = dict(ticket.shape.call).get("strength", 1.0)
        steps = min(ticket.shape.steps, round(_WARM_STEPS / strength + 0.5))
        self._call([ticket], size, lambda *_: True, output_type, steps)

    def preview(self, x_t: Tensor, output_type: str) -> Sequence[Any]:
        """States of stock pipelines have no common form; requests for previews are refused."""
        raise NotImplementedError

    def _call(
        self,
        batch: Sequence[Ticket],
        size: int,
        watch: Watcher,
        output_type: str,
        steps: int,
    ) -> Sequence[Drawn | None] | None:
        shape = batch[0].shape
        if shape.alone is not None:
            size = 1
        rows = [*batch, *[batch[-1]] * (size - len(batch))]
        arguments = self._arguments(rows, steps)
        if self._takes.watches:

            def after_step(pipe: Any, k: int, t: Any, tensors: Any) -> dict[str, Any]:  # noqa: ANN401
                if not watch(k + 1, int(getattr(pipe, "num_timesteps", None) or steps), None):
                    raise _Ended
                return {}

            arguments["callback_on_step_end"] = after_step
        # what is not finite shows in numbers, and no more in a picture
        arguments["output_type"] = "np" if output_type == "pil" else output_type
        try:
            result = self.pipe(**arguments)
        except _Ended:
            self.pipe.maybe_free_model_hooks()
            return None
        images = list(result[0])[: len(batch)]
        flags = getattr(result, "nsfw_content_detected", None) or [False] * len(batch)
        return [
            Drawn(pictures(image) if output_type == "pil" else image, bool(flag))
            if _is_finite(image)
            else None
            for image, flag in zip(images, flags, strict=False)
        ]

    def _arguments(self, rows: Sequence[Ticket], steps: int) -> dict[str, Any]:
        """The arguments of a call for these tickets."""
        shape, takes = rows[0].shape, self._takes
        brought = [_brought(ticket) for ticket in rows]
        arguments = {
            **dict(shape.call),
            "prompt": [ticket.prompt for ticket in rows],
            "num_inference_steps": steps,
            "weights": _weights(brought, steps),
            "seed": [ticket.seed for ticket in rows],
            "zero_variance": "dominate",  # admission refused what was not to be
        }
        if takes.takes_size:
            arguments |= {"height": shape.height, "width": shape.width}
        if "max_area" in takes.call.defaults:
            arguments["max_area"] = shape.height * shape.width
        if shape.has_negative:
            arguments["negative_prompt"] = [ticket.negative_prompt for ticket in rows]
        if shape.with_base:
            arguments["objective_strength"] = _strengths(brought)
        for name in ("image", "mask_image"):
            if getattr(brought[0], name) is not None:
                images = [getattr(one, name) for one in brought]
                arguments[name] = images[0] if shape.alone is not None else images
        if any(one.masks for one in brought):
            arguments["masks"] = [one.masks for one in brought]
        return arguments


def _brought(ticket: Ticket) -> StockImage:
    assert ticket.stock is not None
    return ticket.stock


def _weights(brought: Sequence[StockImage], steps: int) -> Any:  # noqa: ANN401 - as in the call
    """(T, B, M), or a list of mappings from ranges of timesteps; see `Shape.by_range`."""
    given = [one.weights for one in brought]
    rows = [one for one in given if isinstance(one, Tensor)]
    return torch.cat(rows, 1)[:steps] if rows else given


def _strengths(brought: Sequence[StockImage]) -> Tensor:
    """(B, M)."""
    given = [one.strength for one in brought]
    return torch.cat([one for one in given if one is not None])


def _is_finite(image: Any) -> bool:  # noqa: ANN401 - an array, a tensor, or a list of them
    if isinstance(image, Tensor):
        return bool(image.isfinite().all())
    return bool(np.isfinite(np.asarray(image)).all())
