"""The process, or the processes, of a server: connections with limits, and an end that loses nothing that was accepted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.errors import Problem, Stopped, UsageError, missing_extra
from limbeck.serve._app import KEY, Served, make_app
from limbeck.serve._model import open_model
from limbeck.serve._settings import Settings

try:
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError as error:
    raise missing_extra(error.name or "uvicorn", "serve", "Serving") from None

__all__ = ["Named", "serve"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
YOUNG = 10.0
"""Seconds: a worker that ends sooner than this has not served, and starting it again would not help."""

LINGER = 0.3
"""Seconds for which an idle connection of a server that ends is kept, for a request that was sent before the client knew."""

_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


@dataclass(frozen=True)
class Named:
    """A folder to serve, under a name and a version."""

    name: str
    version: str
    folder: Path


class _Connection(HttpToolsProtocol):
    """uvicorn's own, with limits on the size and the time of a header, and on the number of connections."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits: Settings = self.app_state["settings"]
        self._timer: asyncio.TimerHandle | None = None
        self._head = 0  # bytes of the header that is being read
        self._reading, self._closed = False, False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(503, f"more than {self._limits.max_connections} connections.", b"retry-after: 1\r\n")
            return
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        before = self._head if self._reading else 0
        super().data_received(data)
        if self._reading and not self._closed and before + len(data) > self._limits.max_header:
            self._too_long()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head, self._reading = 0, True
        if self._timer is None:
            self._wait()

    def on_url(self, url: bytes) -> None:
        self._head += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head += len(name) + len(value) + 4
        if not self._closed:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reading = False
        self._arrived()
        if self._head > self._limits.max_header:
            self._too_long()
        if not self._closed:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._closed:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._closed:
            super().on_message_complete()

    def shutdown(self) -> None:
        """The server ends: a request that is on its way on this connection is still taken."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LINGER, self._end)
        else:
            super().shutdown()

    def _end(self) -> None:
        if not self._reading and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self._limits.header_timeout, self._late)

    def _arrived(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._reading:
            self._refuse(408, f"the header did not come within {self._limits.header_timeout:g} seconds.")
        elif not self._closed:  # a connection on which nothing was ever asked
            self._closed = True
            self.transport.close()

    def _too_long(self) -> None:
        self._refuse(431, f"the header may have at most {self._limits.max_header:,} bytes.")

    def _refuse(self, status: int, message: str, more: bytes = b"") -> None:
        if self._closed:
            return
        self._closed = True
        body = json.dumps({"error": message}).encode()
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        self.transport.write(head.encode() + more + b"\r\n" + body)
        self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's own; told to stop, it first says so (not ready, close your connection) while it still takes what comes."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        gate: Any = self.config.loaded_app
        gate.draining = True
        await asyncio.sleep(self.config.app_grace)  # type: ignore[attr-defined]
        for listening in sockets or []:
            listening.listen(0)  # the kernel takes one more at most, in place of 2,048
            await self._take_the_last(listening)
        await super().shutdown(sockets)

    async def _take_the_last(self, listening: socket.socket) -> None:
        """Connections that the kernel has accepted and asyncio has not: they would be reset when the socket is closed."""
        loop = asyncio.get_running_loop()

        def protocol() -> _Connection:
            return _Connection(config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop)

        while True:
            try:
                connection, _ = listening.accept()
            except OSError:  # there is none, or another worker has closed it
                return
            connection.setblocking(False)
            await loop.connect_accepted_socket(protocol, connection)


def serve(named: Sequence[Named], settings: Settings) -> None:
    """Serve these models until the process is told to stop (SIGTERM, Ctrl-C); then finish what was accepted, and return.

    Raises: UsageError for models that cannot be loaded or an address that cannot be had, before anything listens; Stopped, where workers die.
    """
    served = [Served(one.name, one.version, open_model(one.folder, settings.threads)) for one in named]
    listening = _bind(settings)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    for one in served:
        print(
            f"{one.name}, version {one.version}: {one.model.kind}, {len(one.model.classes)} classes, {one.model.bytes:,} bytes",
            file=sys.stderr,
        )
    if not os.environ.get(KEY) and settings.host not in LOOPBACK:
        print(f"Anyone who reaches {shown} may ask: set {KEY} to require a key.", file=sys.stderr)
    print(f"Serving on http://{shown}:{port}", file=sys.stderr, flush=True)
    with _ended_quietly() as told:
        if settings.workers == 1:
            _run(served, settings, listening, told)
        else:
            del served  # the workers have their own
            _run_workers(named, settings, listening)
    print("Stopped; all accepted requests were answered.", file=sys.stderr)


def _bind(settings: Settings) -> socket.socket:
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, number)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise UsageError(Problem("--port", f"{settings.host}:{settings.port} cannot be listened on: {error.strerror or error}.")) from None
    listening.set_inheritable(True)
    return listening


def _run(served: Sequence[Served], settings: Settings, listening: socket.socket, told: _Told) -> None:
    config = uvicorn.Config(
        make_app(served, settings),
        http=_Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=max(1, round(settings.keep_alive)),
        timeout_graceful_shutdown=max(1, round(settings.drain)),
        backlog=2048,
    )
    config.app_grace = settings.grace  # type: ignore[attr-defined]
    server = told.server = _Server(config)
    if not told.stop:
        server.run(sockets=[listening])


@dataclass
class _Told:
    """To stop, before the server hears signals itself, or after it has."""

    stop: bool = False
    server: _Server | None = None

    def __call__(self, *_: Any) -> None:
        self.stop = True
        if self.server is not None:
            self.server.should_exit = True


@contextlib.contextmanager
def _ended_quietly() -> Iterator[_Told]:
    """uvicorn raises the signal that it was stopped by again, once it has drained; the process ends with 0 all the same. A signal that comes before
    uvicorn listens counts too: a worker that overheard it would serve on until it is killed, with what it had accepted."""
    told = _Told()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    old = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _worker(named: Sequence[Named], settings: Settings, listening: socket.socket) -> None:
    served = [Served(one.name, one.version, open_model(one.folder, settings.threads)) for one in named]
    with _ended_quietly() as told:
        _run(served, settings, listening, told)


def _run_workers(named: Sequence[Named], settings: Settings, listening: socket.socket) -> None:
    """Start the workers on one socket, start one again that died, and stop them all when told to."""
    context = multiprocessing.get_context("spawn")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    failure: str | None = None
    with tempfile.TemporaryDirectory(prefix="limbeck-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        from prometheus_client import multiprocess

        def started() -> tuple[Any, float]:
            process = context.Process(target=_worker, args=(named, settings, listening))
            process.start()
            return process, time.monotonic()

        workers = [started() for _ in range(settings.workers)]
        try:
            while not stop.wait(0.2):
                for i, (process, since) in enumerate(workers):
                    if process.exitcode is None:
                        continue
                    multiprocess.mark_process_dead(process.pid)  # type: ignore[no-untyped-call]
                    if time.monotonic() - since < YOUNG:
                        failure = f"A worker ended with {process.exitcode} right after it was started."
                        stop.set()
                        break
                    print(f"A worker ended with {process.exitcode}; another one is started.", file=sys.stderr)
                    workers[i] = started()
        finally:
            listening.close()
            for process, _ in workers:
                if process.is_alive():
                    process.terminate()  # SIGTERM: it drains
            for process, _ in workers:
                process.join(settings.grace + settings.drain + 10)
                if process.is_alive():
                    process.kill()
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]
    if failure is not None:
        raise Stopped(failure)
