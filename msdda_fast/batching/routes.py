# SPDX-License-Identifier: Apache-2.0
"""Which pipeline draws which request: from a text, from an image, or inpainting."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from msdda_fast.batching.captured_checks import CapturedChecks
from msdda_fast.batching.checks import Checks, field
from msdda_fast.batching.drawer import Drawer, Drawn, Watcher
from msdda_fast.batching.drawing import BatchDrawer
from msdda_fast.batching.limits import Limits
from msdda_fast.batching.request import ImageRequest
from msdda_fast.batching.stock_checks import StockChecks
from msdda_fast.batching.stock_drawing import StockDrawer
from msdda_fast.batching.ticket import Ticket
from msdda_fast.errors import InvalidRequest, InvalidShape, UnsupportedNetwork
from msdda_fast.pipelines.attach import WithObjectives
from msdda_fast.pipelines.siblings import Task, own_tasks, sibling
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

__all__ = ["Routes"]


class _Route(NamedTuple):
    """Checks and draws the requests of one task."""

    checks: Checks
    drawer: Drawer


class Routes:
    """Finds the pipeline for each request, and draws batches with it; a `Drawer`.

    Pipelines for other tasks than the given one's are made when a request first asks for them, of
    the same networks. Making them is thread-safe, drawing is for one thread.

    Args:
        pipe: With objectives, as `MSDDAPipeline.from_pretrained` and `from_pipe` return them.
        limits: Bounds of one request.

    Raises:
        UnsupportedNetwork: It has no objectives, or its call does not suit requests.
        ValueError: Several processes share it.

    Attributes:
        pipe: A pipeline over the same modules, with a scheduler of its own.
        task: What it does: from a text if it can.
    """

    def __init__(self, pipe: Any, limits: Limits) -> None:  # noqa: ANN401 - of any class
        if not isinstance(pipe, (MSDDAPipeline, WithObjectives)):
            raise UnsupportedNetwork(
                f"an engine draws with a pipeline that has objectives, as MSDDAPipeline.from_pipe "
                f"makes them, got {type(pipe).__name__}"
            )
        self._limits, self._making = limits, threading.Lock()
        self._own = own_tasks(pipe)
        self.task: Task = next(t for t in ("text", "image", "inpaint") if t in self._own)
        own: _Route
        if isinstance(pipe, MSDDAPipeline):
            captured = BatchDrawer(pipe)
            self.pipe: Any = captured.pipe
            own = _Route(CapturedChecks(captured.pipe, limits), captured)
        else:
            own = self._stock_route(pipe, self.task)
            self.pipe = own.drawer.pipe  # type: ignore[attr-defined]  # of a StockDrawer
        self._routes: dict[Task, _Route] = dict.fromkeys(self._own, own)

    def checks(self, request: ImageRequest) -> Checks:
        """Return what checks a request.

        Raises:
            InvalidRequest, InvalidShape: No pipeline could draw it; `field` says why.
        """
        task = _task_of(request)
        with self._making:
            if task not in self._routes:
                with field("mask_image" if task == "inpaint" else "image"):
                    self._routes[task] = self._other(task)
            return self._routes[task].checks

    @property
    def own_checks(self) -> Checks:
        """What checks requests of the task of the given pipeline."""
        return self._routes[self.task].checks

    @property
    def device(self) -> torch.device:
        """The device that batches are drawn on."""
        return self._routes[self.task].drawer.device

    def shared_networks(self) -> Iterable[nn.Module | None]:
        """The networks of all tasks."""
        return self._routes[self.task].drawer.shared_networks()

    def draw(
        self, batch: Sequence[Ticket], *, size: int, watch: Watcher, output_type: str
    ) -> Sequence[Drawn | None] | None:
        """Draw a batch with the pipeline of its task."""
        drawer = self._routes[batch[0].shape.task].drawer
        return drawer.draw(batch, size=size, watch=watch, output_type=output_type)

    def warm(self, ticket: Ticket, size: int, output_type: str) -> None:
        """Build what a batch of copies of a ticket needs."""
        self._routes[ticket.shape.task].drawer.warm(ticket, size, output_type)

    def preview(self, x_t: Tensor, output_type: str) -> Sequence[Any]:
        """Return images of states; only those of the given pipeline are ever asked for."""
        return self._routes[self.task].drawer.preview(x_t, output_type)

    def restart(self) -> None:
        """Give up every buffer and graph of all tasks."""
        for route in list(self._routes.values()):
            route.drawer.restart()

    def _other(self, task: Task) -> _Route:
        try:
            return self._stock_route(sibling(self.pipe, task), task)
        except UnsupportedNetwork as error:
            raise InvalidRequest(
                f"{type(self.pipe).__name__}: {error}"
                + (": give an image" if task == "text" else "")
            ) from error

    def _stock_route(self, pipe: WithObjectives, task: Task) -> _Route:
        checks = StockChecks(pipe, task, self._limits)
        return _Route(checks, StockDrawer(pipe))


def _task_of(request: ImageRequest) -> Task:
    """Return what a request asks for, after a look at its images."""
    for name in ("image", "mask_image"):
        with field(name):
            one = getattr(request, name)
            if one is not None and not isinstance(one, Image.Image):
                raise InvalidRequest(
                    f"{name} must be a PIL image or None, got {type(one).__name__}"
                )
    if request.image is None:
        for name in ("mask_image", "image_strength"):
            with field(name):
                if getattr(request, name) is not None:
                    raise InvalidRequest(f"{name} is of an image to start from: give image, too")
        return "text"
    if request.mask_image is None:
        return "image"
    with field("mask_image"):
        if request.mask_image.size != request.image.size:
            raise InvalidShape(
                f"mask_image has {request.mask_image.size} pixels (width, height), image "
                f"{request.image.size}"
            )
    return "inpaint"
