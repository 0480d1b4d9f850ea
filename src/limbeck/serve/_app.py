"""The web application: the protocol, the friendly ``/predict``, the page, and what watches it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from limbeck import __version__
from limbeck.errors import missing_extra
from limbeck.serve import _openapi as documents
from limbeck.serve import _protocol as protocol
from limbeck.serve._batching import Answer, Batcher, Busy
from limbeck.serve._gate import Gate, Stop
from limbeck.serve._inputs import asked_of, parts_of
from limbeck.serve._metrics import Metrics
from limbeck.serve._model import Refused, ServedModel, softmax
from limbeck.serve._settings import Settings

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise missing_extra(error.name or "fastapi", "serve", "Serving") from None

__all__ = ["KEY", "Served", "make_app"]

KEY = "LIMBECK_API_KEY"
"""The environment variable that holds the key which clients must send."""

EXTENSIONS = ["binary_tensor_data", "model_repository"]
LARGE = 32 << 10
"""Bytes of a body from which on reading it would hold up other requests; it is read in a thread then."""

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; base-uri 'none'"
)


@dataclass(frozen=True)
class Served:
    """A model under its name and version."""

    name: str
    version: str
    model: ServedModel


class _Failed(Exception):
    """An answer that is an error: its status, its sentence, its headers."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {k.replace("_", "-"): v for k, v in headers.items()}


class _Models:
    """The served models with their batchers, by name and version."""

    def __init__(self, served: Sequence[Served], settings: Settings, metrics: Metrics) -> None:
        self.by_name: dict[str, dict[str, tuple[ServedModel, Batcher]]] = {}
        for one in served:
            batcher = Batcher(
                one.model,
                max_batch=settings.max_batch,
                window=settings.window_ms / 1000,
                queue=settings.queue,
                timeout=settings.timeout,
            )
            batcher.seen = metrics.batches(one.name, one.version, lambda b=batcher: b.waiting)  # type: ignore[misc]
            self.by_name.setdefault(one.name, {})[one.version] = (one.model, batcher)

    def versions(self, name: str) -> list[str]:
        """Oldest first. Raises: _Failed."""
        if name not in self.by_name:
            raise _Failed(404, f"there is no model '{name[:100]}'; there are {', '.join(self.by_name)}.")
        return sorted(self.by_name[name], key=_order)

    def find(self, name: str, version: str | None) -> tuple[str, ServedModel, Batcher]:
        """The version asked for, or the latest. Raises: _Failed."""
        versions = self.versions(name)
        wanted = versions[-1] if version is None else version
        if wanted not in versions:
            raise _Failed(404, f"model '{name}' has no version '{wanted[:100]}'; it has {', '.join(versions)}.")
        return wanted, *self.by_name[name][wanted]

    async def close(self) -> None:
        for versions in self.by_name.values():
            for _, batcher in versions.values():
                await batcher.close()


def _order(version: str) -> tuple[int, str]:
    return (int(version), "") if version.isdigit() else (0, version)


def make_app(served: Sequence[Served], settings: Settings | None = None, key: str | None = None) -> Gate:
    """The ASGI application of these models. key: what clients must send; by default what ``LIMBECK_API_KEY`` holds, and none where it is unset."""
    settings = settings or Settings()
    key = os.environ.get(KEY) or None if key is None else key
    metrics = Metrics()
    models = _Models(served, settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        for one in served:
            one.model.warm()
        yield {"settings": settings}
        await models.close()

    app = FastAPI(
        title="Limbeck", version=__version__, description=documents.DESCRIPTION, lifespan=lifespan, redoc_url=None, redirect_slashes=False
    )

    @app.exception_handler(_Failed)
    async def failed(request: Request, error: _Failed) -> Response:
        return _json({"error": str(error)}, error.status, error.headers)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        metrics.refused("input")
        return _json({"error": str(error)}, error.status)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        metrics.refused("queue")
        return _json({"error": str(error)}, 503, {"retry-after": str(error.retry_after)})

    @app.exception_handler(Stop)
    async def stopped(request: Request, error: Stop) -> Response:
        request.scope["seen"].why = error.why
        # the rest of the body is not read, so nothing can follow on this connection
        return _json({"error": str(error)}, error.status, {"connection": "close"})

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return _json({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _json({"error": f"{'.'.join(str(p) for p in first['loc'])}: {first['msg']}"}, 400)

    async def infer(request: Request, name: str, version: str | None) -> Response:
        found, model, batcher = models.find(name, version)
        body = await request.body()
        length = request.headers.get("inference-header-content-length")
        if len(body) > LARGE and length is None:
            asked = await asyncio.to_thread(protocol.read, body, length, model, settings.max_batch)
        else:
            asked = protocol.read(body, length, model, settings.max_batch)
        answer = await batcher(asked.arrays)
        _log(request, name, found, answer)
        content, headers = protocol.answer(answer.logits, asked, name, found)
        return Response(content, headers=headers)

    # --- the Open Inference Protocol
    @app.get("/v2/health/live", tags=["v2"], **documents.LIVE)
    async def live() -> Response:
        """The process answers."""
        return _json({"live": True})

    @app.get("/v2/health/ready", tags=["v2"], **documents.READY)
    async def ready(request: Request) -> Response:
        """Requests are welcome; 503 once the server was told to stop."""
        draining = request.scope["gate"].draining
        return _json({"ready": not draining}, 503 if draining else 200)

    @app.get("/v2", tags=["v2"], **documents.SERVER)
    async def server() -> Response:
        """Who answers."""
        return _json({"name": "limbeck", "version": __version__, "extensions": EXTENSIONS})

    @app.get("/v2/models", tags=["v2"], **documents.MODEL_LIST)
    async def listed() -> Response:
        """Names of the models."""
        return _json({"models": list(models.by_name)})

    @app.post("/v2/repository/index", tags=["v2"], **documents.INDEX)
    async def index(request: Request) -> Response:
        """All models and versions, with their state."""
        body = await request.body()
        if body.strip():
            only_ready = protocol.parse_json(body).get("ready", False)
            if not isinstance(only_ready, bool):
                raise Refused("'ready' must be true or false.")
        rows = [{"name": n, "version": v, "state": "READY", "reason": ""} for n in models.by_name for v in models.versions(n)]
        return _json(rows)

    @app.get("/v2/models/{name}", tags=["v2"], **documents.METADATA)
    async def metadata(name: str) -> Response:
        """Inputs and outputs of a model."""
        _, model, _ = models.find(name, None)
        return _json(protocol.metadata(model, name, models.versions(name)))

    @app.get("/v2/models/{name}/versions/{version}", tags=["v2"], **documents.METADATA)
    async def metadata_of_version(name: str, version: str) -> Response:
        """Inputs and outputs of one version."""
        found, model, _ = models.find(name, version)
        return _json(protocol.metadata(model, name, [found]))

    @app.get("/v2/models/{name}/ready", tags=["v2"], **documents.MODEL_READY)
    async def model_ready(name: str) -> Response:
        """The model answers."""
        models.find(name, None)
        return _json({"name": name, "ready": True})

    @app.get("/v2/models/{name}/versions/{version}/ready", tags=["v2"], **documents.MODEL_READY)
    async def version_ready(name: str, version: str) -> Response:
        """This version answers."""
        models.find(name, version)
        return _json({"name": name, "ready": True})

    @app.post("/v2/models/{name}/infer", tags=["v2"], **documents.INFER)
    async def infer_latest(request: Request, name: str) -> Response:
        """Logits of prepared inputs, by the latest version; JSON, or the binary tensor extension."""
        return await infer(request, name, None)

    @app.post("/v2/models/{name}/versions/{version}/infer", tags=["v2"], **documents.INFER)
    async def infer_version(request: Request, name: str, version: str) -> Response:
        """Logits of prepared inputs, by one version."""
        return await infer(request, name, version)

    # --- for people
    @app.post("/predict", tags=["predict"], **documents.PREDICT)
    async def predict(request: Request) -> Response:
        """Classes with probabilities, for texts or image files as they are.

        Send JSON `{"text": ...}` or `{"texts": [...]}`, an image as the body, or files as `multipart/form-data`.
        """
        start = time.perf_counter()
        asked = asked_of(request.query_params, list(models.by_name))
        found, model, batcher = models.find(asked.model, asked.version)
        body = await request.body()
        read = time.perf_counter()
        parts = await parts_of(body, request.headers, model, settings)
        prepared = time.perf_counter()
        # each on its own: they meet again in the batch, beside those of other requests
        answers = await asyncio.gather(*(batcher(arrays, padded=model.pads) for _, arrays in parts), return_exceptions=True)
        for one in answers:
            if isinstance(one, BaseException):
                raise one
        done = [one for one in answers if isinstance(one, Answer)]
        _log(request, asked.model, found, done[0])
        end = time.perf_counter()
        results = [_result(label, one, model, asked.top) for (label, _), one in zip(parts, done, strict=True)]
        times = {"total": end - start, "read": read - start, "prepare": prepared - read}
        milliseconds = {k: round(v * 1000, 3) for k, v in times.items()}
        milliseconds |= {"queue": round(max(a.queue_ms for a in done), 3), "model": round(max(a.model_ms for a in done), 3)}
        return _json({"model": asked.model, "version": found, "results": results, "time_ms": milliseconds})

    @app.get("/models", tags=["predict"], **documents.DESCRIBED)
    async def described() -> Response:
        """What is served, for people: kind of input, classes, where it is from, its hash."""
        return _json({"models": [_described(n, v, models.find(n, v)[1]) for n in models.by_name for v in models.versions(n)]})

    @app.get("/metrics", tags=["watch"], **documents.METRICS)
    async def exposition() -> Response:
        """Counters for Prometheus."""
        text, kind = await asyncio.to_thread(metrics.text)
        return Response(text, headers={"content-type": kind})

    page = resources.files("limbeck.serve").joinpath("page.html").read_bytes()

    @app.get("/", include_in_schema=False)
    async def home() -> Response:
        return Response(page, headers={"content-type": "text/html; charset=utf-8", "content-security-policy": PAGE_POLICY})

    app.openapi = documents.document(app, served, settings, key is not None)  # type: ignore[method-assign]
    return Gate(app, settings, metrics, key)


def _result(label: str | None, answer: Answer, model: ServedModel, top: int) -> dict[str, Any]:
    probabilities = softmax(answer.logits)[0]
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[: top or None]
    ranked = [{"label": model.classes[i], "probability": float(probabilities[i])} for i in order]
    return {**({} if label is None else {"input": label}), **ranked[0], "probabilities": ranked}


def _described(name: str, version: str, model: ServedModel) -> dict[str, Any]:
    shape = model.image_shape
    more: dict[str, Any] = {} if shape is None else {"image": dict(zip(("channels", "height", "width"), shape, strict=True))}
    return {
        "name": name,
        "version": version,
        "kind": model.kind,
        "task": model.task,
        "classes": list(model.classes),
        "run": model.folder.resolve().name,
        "sha256": model.sha256,
        "bytes": model.bytes,
        **more,
    }


def _log(request: Request, name: str, version: str, answer: Answer) -> None:
    request.scope["seen"].more = {
        "model": name,
        "version": version,
        "batch": answer.batch,
        "queue_ms": round(answer.queue_ms, 3),
        "model_ms": round(answer.model_ms, 3),
    }


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
    return Response(body, status, {**(headers or {}), "content-type": "application/json"})
