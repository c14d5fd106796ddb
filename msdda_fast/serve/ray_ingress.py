# SPDX-License-Identifier: Apache-2.0
"""The routes in front of replicas: check requests, fix their seeds, retry those that were lost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from msdda_fast.batching.request import GeneratedImage, ImageRequest
from msdda_fast.batching.stats import EngineStats
from msdda_fast.errors import MSDDAError
from msdda_fast.serve.app import app_of
from msdda_fast.serve.facts import Facts
from msdda_fast.serve.logs import log_to_stderr
from msdda_fast.serve.ray_drawer import Drawer
from msdda_fast.serve.ray_order import Order
from msdda_fast.serve.service import Service
from msdda_fast.serve.settings import ServeSettings

__all__ = ["Ingress", "ReplicaService"]

#: Longest wait for the counts of all replicas, seconds.
COUNTING_S = 5.0


class Ingress:
    """The app in a Ray actor, without a model; starts when a replica is warm.

    Args:
        drawer: Handle of the replicas.
        settings: Limits of the service.
    """

    async def __init__(  # type: ignore[misc] # Ray awaits it
        self, drawer: DeploymentHandle[Drawer], settings: ServeSettings
    ) -> None:
        log_to_stderr()
        self._service = ReplicaService(drawer, settings, await drawer.facts.remote())

    def __serve_build_asgi_app__(self) -> FastAPI:  # the name is Ray's
        return app_of(self._service)


class ReplicaService(Service):
    """A service whose images are drawn by replicas.

    Args:
        drawer: Handle of the replicas.
        settings: Limits of the service.
        facts: What all replicas have in common.
    """

    def __init__(
        self, drawer: DeploymentHandle[Drawer], settings: ServeSettings, facts: Facts
    ) -> None:
        super().__init__(settings, facts)
        self._drawer = drawer
        self._waited_s = 0.0

    def warm(self) -> None:
        """Do nothing: replicas warm up before they take requests."""

    async def is_serving(self) -> bool:
        """Return whether any replica accepts requests."""
        return any(not s.is_closed and not s.restarting for s in await self._stats())

    @property
    def has_failed(self) -> bool:
        """Always False: Ray replaces replicas that have failed."""
        return False

    async def submit(
        self, request: ImageRequest, count: int, client: str
    ) -> list[Future[GeneratedImage]]:
        """Send the request to replicas until one accepts it; return a future per image."""
        order = Order(self._drawer, request, count, client)
        for future in order.futures:
            future.add_done_callback(self._note)
        try:
            await order.admitted()
        except MSDDAError as error:
            raise self.refusal(error) from error
        return order.futures

    async def stats(self) -> EngineStats:
        """Return the sum of the counts of all current replicas."""
        return total(await self._stats())

    def retry_after_s(self) -> int:
        """Return how long the last image waited in a queue, in whole seconds from 1 to 60."""
        return min(60, max(1, math.ceil(self._waited_s)))

    async def _stats(self) -> list[EngineStats]:
        asked = self._drawer.broadcast("stats")
        try:
            found = await asked.results_async(timeout_s=COUNTING_S, return_exceptions=True)
        except TimeoutError:
            return []
        return [stats for stats in found if isinstance(stats, EngineStats)]

    def _note(self, future: Future[GeneratedImage]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._waited_s = future.result().waited_s


def total(stats: Sequence[EngineStats]) -> EngineStats:
    """Add up the counts of several engines."""
    batch_sizes: Counter[int] = Counter()
    for one in stats:
        batch_sizes.update(one.batch_sizes)
    return EngineStats(
        waiting=sum(one.waiting for one in stats),
        drawing=sum(one.drawing for one in stats),
        completed=sum(one.completed for one in stats),
        cancelled=sum(one.cancelled for one in stats),
        timed_out=sum(one.timed_out for one in stats),
        failed=sum(one.failed for one in stats),
        refused=sum(one.refused for one in stats),
        batches=sum(one.batches for one in stats),
        batch_sizes=batch_sizes,
        rows=sum(one.rows for one in stats),
        drawing_s=sum(one.drawing_s for one in stats),
        restarting=next((one.restarting for one in stats if one.restarting), None),
        failure=next((one.failure for one in stats if one.failure), None),
        is_closed=all(one.is_closed for one in stats),
    )
