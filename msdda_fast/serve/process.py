# SPDX-License-Identifier: Apache-2.0
"""One serving process, or several that share a port."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import uvicorn

from msdda_fast.batching.engine import Engine
from msdda_fast.serve.app import create_app
from msdda_fast.serve.connection import Connection
from msdda_fast.serve.logs import log_to_stderr
from msdda_fast.serve.settings import ServeSettings

if TYPE_CHECKING:
    from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

__all__ = ["Process"]

logger = logging.getLogger("msdda_fast.serve")

#: A process that lives shorter is not replaced.
STARTING_S = 5.0

#: After the time for draining, what is refused must still be sent.
SENDING_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """Loads a model and serves it until SIGTERM or Ctrl-C; can be pickled.

    Attributes:
        load: Returns the pipeline.
        settings: Limits of the service.
        engine: Arguments of `Engine`.
        host, port: The address to listen on.
        grace_s: Seconds after SIGTERM to finish accepted requests; the rest get a 503.
    """

    load: Callable[[], MSDDAPipeline]
    settings: ServeSettings
    engine: Mapping[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    grace_s: float = 30.0

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on `host` and `port`, or on sockets shared with other processes."""
        log_to_stderr()
        with Engine(self.load(), **self.engine) as engine:
            config = uvicorn.Config(
                create_app(engine, self.settings),
                host=self.host,
                port=self.port,
                log_config=None,
                access_log=False,
                http=Connection,
                ws="none",
                timeout_graceful_shutdown=int(self.grace_s) + SENDING_S,
            )
            # uvicorn raises SIGTERM again when it has stopped: the process ends well, with code 0
            signal.signal(signal.SIGTERM, lambda *_: None)
            _Draining(config, engine, self.grace_s).run(sockets)

    def run_many(self, count: int) -> None:
        """Serve with `count` processes on one port, each with its own model.

        A process that dies is replaced.

        Raises:
            RuntimeError: A process died within `STARTING_S` of its start, as the next would too.
        """
        log_to_stderr()
        config = uvicorn.Config("", host=self.host, port=self.port, log_config=None)
        sockets = [config.bind_socket()]
        told = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: told.set())
        children = [_Child(self, sockets) for _ in range(count)]
        try:
            while not told.wait(0.2):
                for index, child in enumerate(children):
                    if not child.process.is_alive():
                        children[index] = child.successor()
        finally:
            for child in children:
                child.process.terminate()
            for child in children:
                child.process.join()


class _Child:
    def __init__(self, served: Process, sockets: list[socket.socket]) -> None:
        self._served, self._sockets = served, sockets
        self._started = time.monotonic()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=served.run, args=(sockets,))
        self.process.start()

    def successor(self) -> _Child:
        """Start the process that replaces this dead one."""
        code = self.process.exitcode
        if time.monotonic() - self._started < STARTING_S:
            raise RuntimeError(f"a serving process ended with code {code} soon after its start")
        logger.error("a serving process died", extra={"fields": {"exit_code": code}})
        return _Child(self._served, self._sockets)


class _Draining(uvicorn.Server):
    """Closes the engine as soon as the server must stop, while connections await their images."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace_s: float) -> None:
        super().__init__(config)
        self._engine, self._grace_s = engine, grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain the engine for at most `grace_s` seconds while the connections close."""
        closing = threading.Thread(
            target=self._engine.close, kwargs={"timeout_s": self._grace_s}, daemon=True
        )
        closing.start()
        await super().shutdown(sockets)
        await asyncio.to_thread(closing.join)
