# SPDX-License-Identifier: Apache-2.0
"""One serving process, or several that share a port."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection as Pipe
from types import FrameType
from typing import Any

import uvicorn

from msdda_fast.batching.engine import Engine
from msdda_fast.serve.app import create_app
from msdda_fast.serve.connection import Connection
from msdda_fast.serve.hosts import is_this_machine
from msdda_fast.serve.logs import log_to_stderr
from msdda_fast.serve.service import EngineService
from msdda_fast.serve.settings import ServeSettings
from msdda_fast.serve.workers import Workers, stop_with_parent

__all__ = ["Process"]

logger = logging.getLogger("msdda_fast.serve")

#: After the time for draining, what is refused must still be sent.
SENDING_S = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """Loads a model and serves it until SIGTERM or Ctrl-C; can be pickled.

    Attributes:
        load: Returns the pipeline, of any class that an `Engine` draws with.
        settings: Limits of the service.
        engine: Arguments of `Engine`.
        host, port: The address to listen on.
        grace_s: Seconds after SIGTERM to finish accepted requests; the rest get a 503.
    """

    load: Callable[[], Any]
    settings: ServeSettings
    engine: Mapping[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    grace_s: float = 8.0

    def run(self, sockets: list[socket.socket] | None = None, ready: Pipe | None = None) -> None:
        """Serve on `host` and `port`, or on sockets shared with other processes.

        Args:
            sockets: Listening sockets.
            ready: Told once, when requests are accepted. Its process is the parent of this one,
                which stops when the parent has ended.

        Raises:
            SystemExit: The model could not be prepared, or the engine has failed; with code 1.
        """
        log_to_stderr()
        if ready is not None:
            stop_with_parent()
        settings = replace(self.settings, is_local=is_this_machine(self.host))
        engine = Engine(self.load(), **self.engine)
        try:
            app = create_app(engine, settings)
            config = uvicorn.Config(
                app,
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
            server = _Server(config, app.state.service, self.grace_s, ready)
            server.run(sockets)
        finally:
            engine.close(drain=False, timeout_s=SENDING_S)
        if server.has_failed:
            raise SystemExit(1)

    def run_many(self, count: int) -> None:
        """Serve with `count` processes on one port, each with its own model.

        A process that ends is replaced: at once if it has served, else after a pause.

        Raises:
            RuntimeError: A process ended by itself before any has served, as the next would too.
        """
        log_to_stderr()
        config = uvicorn.Config("", host=self.host, port=self.port, log_config=None)
        sockets = [config.bind_socket()]
        told = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: told.set())
        workers = Workers(self.run, sockets, count)
        try:
            while not told.wait(0.2):
                workers.tend()
        finally:
            for one in sockets:
                one.close()
            workers.stop(self.grace_s + 2 * SENDING_S)


class _Server(uvicorn.Server):
    """Tells when it is ready, stops when the engine has failed, and drains when it must stop."""

    def __init__(
        self, config: uvicorn.Config, service: EngineService, grace_s: float, ready: Pipe | None
    ) -> None:
        super().__init__(config)
        self._service, self._grace_s, self._ready = service, grace_s, ready
        self.has_failed = False

    async def on_tick(self, counter: int) -> bool:
        """Look at the service, ten times a second; return whether to stop."""
        if self._ready is not None and self._service.is_ready:
            self._ready.send(None)
            self._ready = None
        if self._service.has_failed and not self.should_exit:
            logger.error("the engine has failed: this process stops")
            self.has_failed = self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, and on a second Ctrl-C refuse at once what is not drawn yet."""
        if self.should_exit and sig == signal.SIGINT:
            self._close(drain=False)
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain the engine for at most `grace_s` seconds while the connections close."""
        closing = self._close(timeout_s=self._grace_s)
        await super().shutdown(sockets)
        await asyncio.to_thread(closing.join, SENDING_S)

    def _close(self, **how: Any) -> threading.Thread:  # noqa: ANN401 - `Engine.close` has them
        closing = threading.Thread(target=self._service.engine.close, kwargs=how, daemon=True)
        closing.start()
        return closing
