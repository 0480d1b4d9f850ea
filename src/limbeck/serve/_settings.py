"""What a server is told: where it listens and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Limits and places. Sizes are bytes and times seconds where the name says nothing else.

    threads: of ONNX Runtime for one model (0: as many as it takes by itself). max_batch: rows that run at once, and the most that one request
    may have. window_ms: how long a batch waits for more rows, and only while requests come several at a time. queue: rows that may wait for
    one model. timeout: how long a request may wait for its model. grace: how long a server that was told to stop still takes connections,
    and drain: how long it then waits for answers that are being made.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    threads: int = 0
    max_batch: int = 32
    window_ms: float = 1.0
    queue: int = 256
    timeout: float = 30.0
    max_body: int = 16 << 20
    max_header: int = 32 << 10
    max_pixels: int = 25_000_000
    max_text: int = 20_000
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    keep_alive: float = 30.0
    max_connections: int = 1000
    grace: float = 0.5
    drain: float = 60.0
    access_log: bool = True
