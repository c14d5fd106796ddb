# SPDX-License-Identifier: Apache-2.0
"""The engine: requests of many callers in, shared batches on one thread, futures out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self

from msdda_fast.batching.admission import Admission
from msdda_fast.batching.drawing import BatchDrawer
from msdda_fast.batching.queue import TicketQueue
from msdda_fast.batching.request import GeneratedImage, ImageRequest
from msdda_fast.batching.stats import EngineStats, Tally
from msdda_fast.batching.ticket import Chore, Ticket
from msdda_fast.batching.worker import Worker
from msdda_fast.errors import QueueFull
from msdda_fast.pipelines.request import check_output_type, latent_shape
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

__all__ = ["Engine"]


class Engine:
    """Draws the requests of many callers in shared batches, on a thread of its own.

        with msdda_fast.Engine(pipe, max_batch=8) as engine:
            engine.prepare(num_inference_steps=25)
            request = msdda_fast.ImageRequest("A purple colored dog.", weights={...}, seed=0)
            image = engine.submit(request).result().image
            image = (await asyncio.wrap_future(engine.submit(request))).image   # in a coroutine

    Requests of the same height, width and number of steps share a batch, whatever their prompts,
    weights, seeds and guidance; first come, first served. An image has the noise bits that it would
    have alone. It is within rounding of the image drawn alone, since other batch sizes sum in
    another order: 1 level of 255. In batches of one size, on the CPU, it is the same to the bit
    whoever shares them.

    Batches are padded to few sizes, so that a GPU captures each once, in `prepare`.

    Args:
        pipe: A pipeline with its objectives, on its device. Its modules are the engine's until that
            is closed: do not call, move or change the pipeline meanwhile.
        max_batch: Most images drawn together.
        max_wait_ms: Longest that a request waits for company, milliseconds; it waits longer only
            for batches before its own.
        queue_limit: Most images that wait.
        batch_sizes: What batches are padded to, increasing up to `max_batch`. None: powers of two,
            and `max_batch`.
        output_type: Of the images, as in the pipeline's call.

    Raises:
        ValueError: A number outside its range, or a pipeline shared by several processes.
    """

    def __init__(
        self,
        pipe: MSDDAPipeline,
        *,
        max_batch: int = 8,
        max_wait_ms: float = 20.0,
        queue_limit: int = 64,
        batch_sizes: Sequence[int] | None = None,
        output_type: str = "pil",
    ) -> None:
        if max_batch < 1 or queue_limit < 1 or not 0 <= max_wait_ms < float("inf"):
            raise ValueError(
                "max_batch and queue_limit must be at least 1 and max_wait_ms at least 0, got "
                f"{max_batch}, {queue_limit} and {max_wait_ms}"
            )
        if pipe.parallel is not None:
            raise ValueError("an engine runs in one process: call disable_parallel() first")
        check_output_type(output_type)
        self._sizes = _sizes(max_batch, batch_sizes)
        drawer = BatchDrawer(pipe)
        self._pipe = drawer.pipe
        self._admission = Admission(self._pipe)
        self._queue = TicketQueue(
            max_batch=max_batch, max_wait_s=max_wait_ms / 1e3, limit=queue_limit
        )
        self._tally = Tally()
        self._worker = Worker(
            drawer, self._queue, self._tally, sizes=self._sizes, output_type=output_type
        )
        self._worker.start()

    @property
    def pipe(self) -> MSDDAPipeline:
        """The pipeline that draws: read its objectives, sizes and settings, and change nothing."""
        return self._pipe

    @property
    def queue_limit(self) -> int:
        """Most images that wait."""
        return self._queue.limit

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height that the model draws by itself, in pixels."""
        config, factor = self._pipe.unet.config, self._pipe.vae_scale_factor
        *_, rows, columns = latent_shape(1, config, factor, None, None)
        return columns * factor, rows * factor

    def submit(self, request: ImageRequest) -> Future[GeneratedImage]:
        """Submit a request for one image; see `submit_images`."""
        return self.submit_images(request, 1)[0]

    def submit_images(self, request: ImageRequest, count: int) -> list[Future[GeneratedImage]]:
        """Submit a request for `count` images, with seeds that count up.

        All are admitted, or none. A future may be cancelled until its image is there: it leaves the
        queue at once, and a batch that nobody waits for any more ends at its next step.

        Returns: One future per image. Besides the image its outcome may be `RequestTimeout`,
            `EngineClosed` or `EngineFailed`, or what its `on_step` raised.

        Raises:
            UnknownObjective, InvalidWeights, InvalidSchedule, InvalidShape, ZeroVariance,
            InvalidRequest: What the request asks for cannot be; `field` of the error says where.
            ValueError: `count` is below 1, or more than may ever wait.
            QueueFull: Too many wait already.
            EngineClosed: The engine was closed, or has failed.
        """
        if not 1 <= count <= self.queue_limit:
            raise ValueError(f"count must be from 1 to {self.queue_limit}, got {count}")
        try:
            self._queue.check_room(count)  # first, so that a refusal costs next to nothing
            tickets = self._admission.tickets(request, count)
            self._queue.join(tickets)
        except QueueFull:
            self._tally.count("refused", count)
            raise
        for ticket in tickets:
            ticket.future.add_done_callback(partial(self._left, ticket))
        return [ticket.future for ticket in tickets]

    def prepare(
        self,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
    ) -> None:
        """Build, and capture where the device can, all that requests of a shape will need.

        That is a batch of every size, with guidance and without. Requests are admitted meanwhile.

        Args:
            height, width: In pixels; None: the model's own.
            num_inference_steps: T; another T needs nothing new while both are at most 64.

        Raises:
            InvalidShape, InvalidSchedule: As the pipeline's call.
            CaptureError: Capture is required, and fails.
            EngineClosed: The engine was closed, or has failed.
        """
        asked = ImageRequest(
            "", seed=0, num_inference_steps=num_inference_steps, height=height, width=width
        )
        chores = []
        for guidance in (1.0, 2.0):
            (ticket,) = self._admission.tickets(
                replace(asked, guidance_scale=guidance), zero_variance="dominate"
            )
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
            is_closed=self._queue.is_closed,
        )

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Refuse new requests and end the thread. Closing twice is allowed.

        Args:
            drain: Draw what was admitted before; else it is refused with `EngineClosed`, and the
                batch being drawn ends at its next step.
            timeout_s: Longest time for draining; what is not drawn then is refused. None: as long
                as it takes.
        """
        self._worker.stop(drain=drain)
        if self._worker is not threading.current_thread():
            self._worker.join(timeout_s)
            if self._worker.is_alive():
                self.close(drain=False)

    def _left(self, ticket: Ticket, future: Future[GeneratedImage]) -> None:
        if future.cancelled():
            ticket.claim()  # tells those who wait for it
            self._tally.count("cancelled")
            self._queue.leave(ticket)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(drain=kind is None)


def _sizes(max_batch: int, sizes: Sequence[int] | None) -> list[int]:
    if sizes is None:
        powers = (2**i for i in range(max_batch.bit_length()))
        return sorted({*powers, max_batch})
    if list(sizes) != sorted(set(sizes)) or not sizes or sizes[0] < 1 or sizes[-1] != max_batch:
        raise ValueError(f"batch_sizes must increase up to max_batch={max_batch}, got {sizes}")
    return list(sizes)
