# SPDX-License-Identifier: Apache-2.0
"""The engine: takes requests from many callers, draws shared batches on one thread."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Self

from msdda_fast.batching.admission import Admission
from msdda_fast.batching.leaving import end, left
from msdda_fast.batching.limits import Limits, duration, integer
from msdda_fast.batching.queue import TicketQueue
from msdda_fast.batching.request import GeneratedImage, ImageRequest
from msdda_fast.batching.routes import Routes
from msdda_fast.batching.stats import EngineStats, Tally
from msdda_fast.batching.ticket import Chore
from msdda_fast.batching.worker import Worker
from msdda_fast.errors import EngineClosed, InvalidRequest, QueueFull
from msdda_fast.pipelines.attach import WithObjectives
from msdda_fast.pipelines.request import check_output_type
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

__all__ = ["Engine"]


class Engine:
    """Draws requests from many callers in shared batches, on its own thread.

        with msdda_fast.Engine(pipe, max_batch=8) as engine:
            engine.prepare(num_inference_steps=25)
            request = msdda_fast.ImageRequest("A purple colored dog.", weights={...}, seed=0)
            image = engine.submit(request).result().image
            image = (await asyncio.wrap_future(engine.submit(request))).image   # in a coroutine

    Requests with the same height, width and number of steps share a batch, whatever their prompts,
    weights and seeds, images and masks. With Stable Diffusion 1 and 2 guidance may differ, too;
    other pipelines have one guidance scale in a call. Clients named in `submit` take turns; within
    one, first come, first served. An image gets the same noise bits as when drawn alone. It differs
    from that image by rounding only (1 level of 255), since other batch sizes sum in another order.
    On the CPU, in batches of one size, it is the same to the bit whichever requests share it.

    Batches are padded to a few sizes, so that a GPU captures each once, in `prepare`. Only Stable
    Diffusion 1 and 2 from a text is captured; the rest is one call of a stock pipeline per batch.

    Requests with an image, and a mask, are drawn by the pipeline that diffusers has for that with
    the networks of the given one. What a family cannot do is refused with the field's name.

    The images of a batch that fails are drawn again, each alone, once, with `on_step` called from
    step 1 again; only what fails twice fails. An engine that can draw nothing any more, whatever
    the request, restarts its buffers and graphs after growing waits (`EngineStats.restarting`).
    After a minute of those it fails for good (`has_failed`): all requests get `EngineFailed`, and
    its process should be replaced.

    An engine that is dropped without `close` draws what was admitted, then ends its thread. In a
    forked child it refuses every request; make one there.

    Args:
        pipe: A pipeline with its objectives, on its device, of any class that
            `MSDDAPipeline.from_pretrained` and `from_pipe` return. Until the engine is closed it
            owns the modules: do not call, move or change the pipeline.
        max_batch: Most images drawn together.
        max_wait_ms: Longest time that a request waits for others to share its batch, milliseconds;
            it waits longer only for earlier batches.
        queue_limit: Most images in the queue.
        client_limit: Most images of one client in the queue, up to `queue_limit`. None: half of it.
        max_pixels: Largest height x width of one image.
        max_cost: Largest images x height x width x steps of one request, times its frames if it is
            a video. The default lets through 80 images of 512 x 512 pixels in 50 steps.
        batch_sizes: Sizes that batches are padded to, increasing up to `max_batch`. None: powers of
            two, and `max_batch`.
        output_type: Type of the images, as in the pipeline's call.

    Raises:
        ValueError: A number is out of range, or several processes share the pipeline.
        UnsupportedNetwork: It has no objectives, or its call does not suit requests: it takes a
            control image, makes sound, or has no seed.
        InvalidSchedule: Its objectives cannot be mixed.
        InvalidRequest: `max_pixels` or `max_cost` rule out any image of the model's own size.
    """

    def __init__(
        self,
        pipe: MSDDAPipeline | WithObjectives,
        *,
        max_batch: int = 8,
        max_wait_ms: float = 20.0,
        queue_limit: int = 64,
        client_limit: int | None = None,
        max_pixels: int = 2**22,
        max_cost: int = 2**30,
        batch_sizes: Sequence[int] | None = None,
        output_type: str = "pil",
    ) -> None:
        limits = Limits.check(
            max_batch=max_batch,
            max_wait_ms=max_wait_ms,
            queue_limit=queue_limit,
            client_limit=client_limit,
            max_pixels=max_pixels,
            max_cost=max_cost,
            batch_sizes=batch_sizes,
        )
        check_output_type(output_type)
        self._sizes = limits.batch_sizes
        self._routes = Routes(pipe, limits)
        self._admission = Admission(self._routes.checks)
        self._plain = self._routes.own_checks.plain
        self._queue = TicketQueue(limits)
        self._tally = Tally()
        probe = self._admission.tickets(self._plain(2)[0], zero_variance="dominate")[0]
        self._worker = Worker(
            self._routes,
            self._queue,
            self._tally,
            probe=probe,
            sizes=self._sizes,
            output_type=output_type,
        )
        self._process = os.getpid()
        self._worker.start()
        self._dropped = weakref.finalize(self, end, self._worker, self._process)
        self._dropped.atexit = False  # the thread is a daemon, which ends with its process

    @property
    def pipe(self) -> Any:  # noqa: ANN401 - of the class that the engine was given
        """The pipeline that draws; for reading its objectives and settings only."""
        return self._routes.pipe

    @property
    def has_failed(self) -> bool:
        """Whether the engine has failed for good: it draws nothing again. See `stats().failure`."""
        return self._worker.failure is not None

    @property
    def queue_limit(self) -> int:
        """Most images in the queue."""
        return self._queue.limit

    @property
    def client_limit(self) -> int:
        """Most images of one client in the queue."""
        return self._queue.client_limit

    @property
    def native_size(self) -> tuple[int, int]:
        """Default width and height of the model's images, in pixels."""
        return self._routes.own_checks.native_size()

    def check(self, request: ImageRequest, count: int = 1) -> None:
        """Check a request for `count` images as `submit_images` does, and draw nothing.

        Raises:
            MSDDAError: As in `submit_images`, but for what depends on the queue.
        """
        self._admission.tickets(request, count)

    def submit(self, request: ImageRequest, *, client: str | None = None) -> Future[GeneratedImage]:
        """Submit a request for one image; arguments and errors as in `submit_images`."""
        return self.submit_images(request, 1, client=client)[0]

    def submit_images(
        self, request: ImageRequest, count: int, *, client: str | None = None
    ) -> list[Future[GeneratedImage]]:
        """Submit a request for `count` images, with consecutive seeds.

        All are admitted, or none. A future can be cancelled until its image is done: it leaves the
        queue at once, and a batch with no open request left ends at its next step.

        Args:
            request: What to draw.
            count: How many images.
            client: Who asks. Clients take turns, and each may have `client_limit` images waiting,
                but no more than there are places left in the queue: one client cannot keep others
                out. The name stands in error messages. None: takes turns as one more client, but
                without that limit.

        Returns: One future per image. Instead of an image it may hold `RequestTimeout`,
            `EngineClosed`, `EngineFailed`, or the exception that `on_step` raised.

        Raises:
            UnknownObjective, InvalidWeights, InvalidSchedule, InvalidShape, ZeroVariance,
            InvalidRequest: The request is invalid; `field` of the error names the wrong field.
            ValueError: `count` is below 1, or more than may ever wait.
            QueueFull: The queue has no room for `count` more images, or for so many of this client:
                `client` of the error says which, `retry_after_s` when to try again.
            EngineClosed: The engine was closed, has failed, or belongs to the parent process.
        """
        self._check_process()
        count = integer("count", count)
        if client is not None and not (isinstance(client, str) and client):
            raise InvalidRequest(f"client must be a name or None, got {client!r}")
        most = self.queue_limit if client is None else self.client_limit
        if not 1 <= count <= most:
            raise ValueError(f"count must be from 1 to {most}, got {count}")
        try:
            self._queue.check_room(count, client)  # first: a refusal costs next to nothing
            tickets = self._admission.tickets(request, count, client=client)
            for ticket in tickets:
                ticket.future.would_wait_forever = self._worker.waits_for_caller
            self._queue.put(tickets)
        except QueueFull as error:
            ahead = len(self._queue) + self._worker.drawing
            error.retry_after_s = self._tally.seconds_to_draw(ahead)
            self._tally.count("refused", count)
            raise
        for ticket in tickets:
            leave = partial(left, self._queue, self._tally, weakref.ref(ticket))
            ticket.future.add_done_callback(leave)
        return [ticket.future for ticket in tickets]

    def prepare(
        self,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
    ) -> None:
        """Build, and capture where the device can, everything that requests of a shape need.

        That is a batch of every size, with and without guidance where graphs differ. Requests are
        admitted meanwhile.

        Args:
            height, width: In pixels; None: the model's own.
            num_inference_steps: T; one call with T <= 64 serves every T <= 64.

        Raises:
            InvalidShape, InvalidSchedule: As in the pipeline's call.
            CaptureError: Capture is required and fails.
            InvalidRequest: The caller is a callback, for which the engine would wait.
            EngineClosed: The engine was closed, has failed, or belongs to the parent process.
        """
        self._check_process()
        if self._worker.waits_for_caller():
            raise InvalidRequest("prepare() cannot be called from on_step or another callback")
        chores = []
        for asked in self._plain(num_inference_steps, height, width):
            (ticket,) = self._admission.tickets(asked, zero_variance="dominate")
            for size in reversed(self._sizes):
                chores.append(Chore(partial(self._worker.warm, ticket, size)))
                self._queue.add(chores[-1])
        for chore in chores:
            chore.future.result()

    def stats(self) -> EngineStats:
        """Return the counts so far."""
        return self._tally.snapshot(
            waiting=len(self._queue),
            drawing=self._worker.drawing,
            failure=self._worker.failure,
            restarting=self._worker.restarting,
            is_closed=self._queue.is_closed,
        )

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Refuse new requests and end the thread. Closing twice is allowed.

        In a callback, for which the thread waits, this does not wait for it.

        Args:
            drain: Draw the requests already admitted; else they fail with `EngineClosed`, and the
                batch being drawn ends at its next step.
            timeout_s: >= 0, longest time that this takes, seconds; requests not drawn by then fail
                at once, and the thread ends after the step that it is in. None: no limit.
        """
        if timeout_s is not None:
            timeout_s = duration("timeout_s", timeout_s)
        if self._process != os.getpid():
            return  # the parent's: its thread is not here, and a lock may be held for ever
        self._worker.stop(drain=drain)
        if not self._worker.waits_for_caller():
            self._worker.join(None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))
            if self._worker.is_alive():
                self._worker.stop(drain=False)

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise EngineClosed(
                f"this engine belongs to process {self._process}, of which this one is a fork: "
                f"make an engine here"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(drain=kind is None)
