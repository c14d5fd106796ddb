# SPDX-License-Identifier: Apache-2.0
"""Serving processes that share a port, and are replaced when they end."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

__all__ = ["Workers", "stop_with_parent"]

logger = logging.getLogger("msdda_fast.serve")

#: Longest pause before a process that did not come to serve is started again, seconds.
LONGEST_PAUSE_S = 30.0


class Workers:
    """Processes that run one function, each of which says once when it serves.

    Args:
        run: `run(sockets, ready)`; can be pickled.
        sockets: Listening sockets that they share.
        count: How many.
    """

    def __init__(self, run: Callable[..., None], sockets: list[socket.socket], count: int) -> None:
        self._workers = [_Worker(run, sockets) for _ in range(count)]
        self._have_served = False

    def tend(self) -> None:
        """Replace those that have ended, if it is time.

        Raises:
            RuntimeError: One ended by itself before any has served.
        """
        for worker in self._workers:
            self._have_served |= worker.serves()
            if worker.process.is_alive():
                continue
            code = worker.process.exitcode or 0
            if code > 0 and not self._have_served:
                raise RuntimeError(f"a serving process ended with code {code} before it served")
            worker.replace()

    def stop(self, timeout_s: float) -> None:
        """Tell all to stop, and wait; those that still run after `timeout_s` are killed."""
        end = time.monotonic() + timeout_s
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(max(0.0, end - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def stop_with_parent() -> None:
    """Stop this process in the usual way once its parent has ended, however that came about."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def stop() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()


class _Worker:
    def __init__(self, run: Callable[..., None], sockets: list[socket.socket]) -> None:
        self._run, self._sockets = run, sockets
        self._losses = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ready, ready = context.Pipe(duplex=False)
        self._serves, self._again_at = False, 0.0
        self.process: Any = context.Process(target=self._run, args=(self._sockets, ready))
        self.process.start()
        ready.close()

    def serves(self) -> bool:
        """Return whether the process has come to serve."""
        if not self._serves and self._ready.poll():
            try:
                self._ready.recv()
            except EOFError:  # it has ended
                return False
            self._serves, self._losses = True, 0
        return self._serves

    def replace(self) -> None:
        """Start the successor of the dead process, after a pause if it did not come to serve."""
        now = time.monotonic()
        if not self._again_at:
            pause = 0.0 if self._serves else min(LONGEST_PAUSE_S, 2.0**self._losses)
            self._losses += not self._serves
            self._again_at = now + pause
            fields = {"exit_code": self.process.exitcode, "again_in_s": pause}
            logger.error("a serving process died", extra={"fields": fields})
        if now >= self._again_at:
            self._ready.close()
            self._start()
