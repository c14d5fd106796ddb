# SPDX-License-Identifier: Apache-2.0
"""Independent jobs, run by a Ray cluster; results are returned to the caller.

Workers need the package and the paths that a job names, but no folder shared with the caller.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, TypeVar

from msdda_fast.errors import BackendUnavailable

try:
    import ray
    from ray.exceptions import RayTaskError
except ModuleNotFoundError as error:
    raise BackendUnavailable(
        f"{error.name} is missing; install it with: pip install 'msdda-fast[ray]'"
    ) from None

__all__ = ["RayTasks", "connected"]

Job = TypeVar("Job")
Result = TypeVar("Result")

#: How often Ray runs a job again whose process or machine was lost.
MOST_LOSSES = 5
#: Longest wait for a cluster to answer, seconds.
ANSWER_S = 5.0


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster as its driver.

    Args:
        address: HOST:PORT, ray://HOST:PORT, or "auto" for the cluster that this machine is part of.

    Raises:
        BackendUnavailable: No cluster answers at this address.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    try:
        if colon:  # Ray itself would try for a minute
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise BackendUnavailable(f"no Ray cluster answers at {address!r}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


class RayTasks(Generic[Job, Result]):
    """Runs jobs on the cluster that this process is connected to.

    Args:
        prepare: Returns the function that does a job; called once in each process that gets one.
        num_cpus, num_gpus: Resources per job.
    """

    def __init__(
        self, prepare: Callable[[], Callable[[Job], Result]], *, num_cpus: float, num_gpus: float
    ) -> None:
        # pickled once, so that processes know it again by its bytes
        self._prepare = ray.cloudpickle.dumps(prepare)
        remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=MOST_LOSSES)
        self._do: Any = remote(_do)

    def __call__(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        """Yield jobs with their results, in the order in which they finish.

        Unfinished jobs are cancelled when the caller stops.

        Raises:
            Exception: Whatever a job raised.
            ray.exceptions.RayError: A job was lost too often.
        """
        waiting = {self._do.remote(self._prepare, job): job for job in jobs}
        try:
            while waiting:
                (finished,), _ = ray.wait(list(waiting))
                try:
                    result = ray.get(finished)
                except RayTaskError as error:
                    raise error.cause from error
                yield waiting.pop(finished), result
        finally:
            for task in waiting:
                ray.cancel(task, force=True)


def _do(prepare: bytes, job: Any) -> Any:  # noqa: ANN401 - of any kind
    return _prepared(prepare)(job)


@cache
def _prepared(prepare: bytes) -> Callable[[Any], Any]:
    """Return what does jobs; cached, so that a worker process loads a model only once."""
    function: Callable[[Any], Any] = ray.cloudpickle.loads(prepare)()
    return function
