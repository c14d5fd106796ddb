# SPDX-License-Identifier: Apache-2.0
"""Which pipeline draws which request: from a text, from an image, or inpainting."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
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
from msdda_fast.batching.ticket import RequestTask, Ticket
from msdda_fast.errors import InvalidRequest, InvalidShape, UnsupportedNetwork
from msdda_fast.pipelines.attach import WithObjectives
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.pipelines.tasks import (
    Task,
    check_from_text,
    for_task,
    shared_guidance,
    task_class,
)

__all__ = ["Routes"]

IMAGE_TASKS: tuple[Task, ...] = ("image-to-image", "inpaint")


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
        drawer: BatchDrawer | StockDrawer
        checks: Checks
        if isinstance(pipe, MSDDAPipeline):
            self.task: RequestTask = "text"
            drawer = BatchDrawer(pipe)
            checks = CapturedChecks(drawer.pipe, limits)
        else:
            self.task = _own_task(pipe.stock_class)
            checks, drawer = StockChecks(pipe, self.task, limits), StockDrawer(pipe)
        self.pipe: Any = drawer.pipe
        self._routes: dict[RequestTask, _Route] = {self.task: _Route(checks, drawer)}

    def checks(self, request: ImageRequest) -> Checks:
        """Return what checks a request.

        Raises:
            InvalidRequest, InvalidShape: No pipeline could draw it; `field` says why.
        """
        task = _task_of(request)
        with self._making:
            if task not in self._routes:
                with field("mask_image" if task == "inpaint" else "image"):
                    self._routes[task] = self._route(task)
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

    def _route(self, task: RequestTask) -> _Route:
        """Make the pipeline of another task than the given one's."""
        try:
            if task == "text":
                check_from_text(self.pipe.stock_class)
                pipe = self.pipe
            else:
                pipe = for_task(self.pipe, task)
            checks = StockChecks(pipe, task, self._limits, shared_guidance(self.pipe))
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        return _Route(checks, StockDrawer(pipe))


def _own_task(kind: type) -> RequestTask:
    """Return what a class of stock pipelines does: from a text if it can."""
    try:
        check_from_text(kind)
    except UnsupportedNetwork as error:
        for task in IMAGE_TASKS:
            with suppress(UnsupportedNetwork):
                if task_class(kind, task) is kind:
                    return task
        raise error
    return "text"


def _task_of(request: ImageRequest) -> RequestTask:
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
        return "image-to-image"
    with field("mask_image"):
        if request.mask_image.size != request.image.size:
            raise InvalidShape(
                f"mask_image has {request.mask_image.size} pixels (width, height), image "
                f"{request.image.size}"
            )
    return "inpaint"
