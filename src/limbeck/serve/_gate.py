"""What every request passes before the application sees it: key, limits, the log and the counters. Pure ASGI."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from limbeck.serve._metrics import Metrics
from limbeck.serve._settings import Settings

__all__ = ["Gate", "Stop"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = ("/", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json")
"""What needs no key: what a probe asks, and pages on which nothing of the models' data stands."""


class Stop(Exception):
    """A request that is refused before or while its body is read."""

    def __init__(self, status: int, message: str, why: str) -> None:
        super().__init__(message)
        self.status, self.why = status, why


class Gate:
    """The application behind its limits.

    key: what clients must send as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``; None asks for none. Once ``draining`` is set, every
    answer asks the client to close its connection.
    """

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], settings: Settings, metrics: Metrics, key: str | None
    ) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._key = None if key is None else _digest(key.encode())
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = _Seen(scope)
        headers = dict(reversed(scope["headers"]))  # the first of each name
        scope["gate"] = self
        scope["seen"] = seen

        async def out(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                extra = [(b"x-request-id", seen.id.encode()), (b"x-content-type-options", b"nosniff")]
                if self.draining and not any(name == b"connection" for name, _ in message.get("headers", [])):
                    extra.append((b"connection", b"close"))
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            else:
                seen.bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            refused = self._refused(scope, headers)
            if refused is not None:
                seen.why = refused.why
                await self._refuse(refused, out)
                return
            await self._app(scope, self._measured(receive, seen), out)
        finally:
            self._record(scope, seen)

    def _refused(self, scope: Scope, headers: dict[bytes, bytes]) -> Stop | None:
        """What can be said before the body is read."""
        if self._key is not None and scope["path"] not in OPEN:
            given = headers.get(b"x-api-key", b"")
            kind, _, token = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() == b"bearer":
                given = token.strip()
            # digests: the comparison takes the same time for keys of all lengths
            if not hmac.compare_digest(_digest(given), self._key):
                return Stop(401, "a key is needed: Authorization: Bearer KEY, or X-API-Key: KEY.", "key")
        length = headers.get(b"content-length")
        if length is not None and (not length.isdigit() or int(length[:20]) > self._settings.max_body):
            return Stop(413, f"the body may have at most {self._settings.max_body:,} bytes.", "body")
        coding = headers.get(b"content-encoding", b"identity").strip().lower()
        if coding not in (b"identity", b""):
            return Stop(415, "compressed bodies are not taken; send it as it is.", "encoding")
        return None

    def _measured(self, receive: Receive, seen: _Seen) -> Receive:
        """``receive`` that ends a body which is too long or takes too long."""
        until: float | None = None
        ended = False

        async def measured() -> Message:
            nonlocal until, ended
            if ended:  # the application waits for the client to go
                return await receive()
            loop = asyncio.get_running_loop()
            until = loop.time() + self._settings.body_timeout if until is None else until
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise Stop(408, f"the body did not come within {self._settings.body_timeout:g} seconds.", "slow") from None
            if message["type"] == "http.request":
                seen.bytes_in += len(message.get("body", b""))
                ended = not message.get("more_body", False)
                if seen.bytes_in > self._settings.max_body:
                    raise Stop(413, f"the body may have at most {self._settings.max_body:,} bytes.", "body")
            return message

        return measured

    async def _refuse(self, stop: Stop, send: Send) -> None:
        body = json.dumps({"error": str(stop)}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if stop.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        headers.append((b"connection", b"close"))  # the rest of the body is not read, so nothing can follow on this connection
        await send({"type": "http.response.start", "status": stop.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _record(self, scope: Scope, seen: _Seen) -> None:
        seconds = time.perf_counter() - seen.start
        route = scope.get("route")
        path = getattr(route, "path", "other")
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS") else "other"
        self._metrics.request(path, method, seen.status, seconds)
        if seen.why:
            self._metrics.refused(seen.why)
        if not self._settings.access_log:
            return
        client = scope.get("client")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{int(time.time() * 1000) % 1000:03d}Z",
            "id": seen.id,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"][:500],
            "status": seen.status,
            "ms": round(seconds * 1000, 3),
            "bytes_in": seen.bytes_in,
            "bytes_out": seen.bytes_out,
            **seen.more,
            **({"refused": seen.why} if seen.why else {}),
        }
        # a reader of the log that has gone must not cost a client its answer
        try:
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
        except (OSError, ValueError):
            pass


class _Seen:
    """What is known of one request when it ends. more: what the application adds to the log."""

    def __init__(self, scope: Scope) -> None:
        self.start = time.perf_counter()
        self.id = uuid.uuid4().hex[:16]
        self.status = self.bytes_in = self.bytes_out = 0
        self.why = ""
        self.more: dict[str, Any] = {}


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
