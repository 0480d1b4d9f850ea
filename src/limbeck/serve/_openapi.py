"""The OpenAPI document: what the routes take and give, and of each served model what exactly it takes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from limbeck.serve._protocol import PREPARED

if TYPE_CHECKING:
    from fastapi import FastAPI

    from limbeck.serve._app import Served
    from limbeck.serve._settings import Settings

__all__ = ["DESCRIBED", "DESCRIPTION", "INDEX", "INFER", "LIVE", "METADATA", "METRICS", "MODEL_LIST", "MODEL_READY", "PREDICT", "READY"]
__all__ += ["SERVER", "document"]

DESCRIPTION = "Distilled students behind the Open Inference Protocol (version 2), and `/predict` for texts and image files as they are."

_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_NAME = {"type": "string"}
_PORT = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {"name": _NAME, "datatype": _NAME, "shape": {"type": "array", "items": {"type": "integer"}}},
}


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required or properties), "properties": properties}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _gives(schema: dict[str, Any], *errors: int, kind: str = "application/json", **more: Any) -> dict[str, Any]:
    """Arguments of a route: its answer, and the statuses that it may answer instead."""
    responses: dict[int | str, Any] = {200: {"description": "Done", "content": {kind: {"schema": schema}}}}
    for status in sorted({401, *errors}):
        responses[status] = {"description": _SAYS[status], "content": {"application/json": {"schema": _ERROR}}}
    return {"responses": responses, "response_model": None, **({"openapi_extra": more} if more else {})}


_SAYS = {
    400: "The request cannot be read, or the model cannot take it",
    401: "A key is needed",
    404: "No such model or version",
    408: "The body came too slowly",
    413: "The body or the image is too large",
    415: "A content type or coding that is not taken",
    503: "The queue is full, or the server is stopping; see Retry-After",
}

LIVE = _gives(_object(live={"type": "boolean"}))
READY = _gives(_object(ready={"type": "boolean"}))
READY["responses"][503] = {
    "description": "The server is stopping",
    "content": {"application/json": {"schema": _object(ready={"type": "boolean"})}},
}
SERVER = _gives(_object(name=_NAME, version=_NAME, extensions=_list(_NAME)))
MODEL_LIST = _gives(_object(models=_list(_NAME)))
METADATA = _gives(_object(name=_NAME, versions=_list(_NAME), platform=_NAME, inputs=_list(_PORT), outputs=_list(_PORT)), 404)
MODEL_READY = _gives(_object(name=_NAME, ready={"type": "boolean"}), 404)
METRICS = _gives({"type": "string"}, kind="text/plain")
DESCRIBED = _gives(_object(models=_list(_object("name", "version", "kind", name=_NAME, version=_NAME, kind=_NAME, classes=_list(_NAME)))))
INDEX = _gives(
    _list(_object("name", name=_NAME, version=_NAME, state=_NAME, reason=_NAME)),
    400,
    408,
    413,
    415,
    requestBody={
        "required": False,
        "content": {"application/json": {"schema": {"type": "object", "properties": {"ready": {"type": "boolean"}}}}},
    },
)

_OUTPUT = _object(
    "name", "datatype", "shape", "data", name=_NAME, datatype=_NAME, shape=_list({"type": "integer"}), data=_list({"type": "number"})
)
INFER = _gives(
    _object("model_name", "outputs", model_name=_NAME, model_version=_NAME, id=_NAME, outputs=_list(_OUTPUT)), 400, 404, 408, 413, 415, 503
)

_RANKED = _object(label=_NAME, probability={"type": "number", "minimum": 0, "maximum": 1})
_RESULT = _object("label", "probability", "probabilities", input=_NAME, **_RANKED["properties"], probabilities=_list(_RANKED))
PREDICT = _gives(
    _object(model=_NAME, version=_NAME, results=_list(_RESULT), time_ms={"type": "object", "additionalProperties": {"type": "number"}}),
    400,
    404,
    408,
    413,
    415,
    503,
)

_BYTES = {"type": "string", "format": "binary"}


def document(app: FastAPI, served: Sequence[Served], settings: Settings, keyed: bool) -> Callable[[], dict[str, Any]]:
    """``app.openapi`` with the served models' own names, versions and tensors in it."""
    made: dict[str, Any] = {}
    plain = app.openapi

    def build() -> dict[str, Any]:
        if not made:
            made.update(_document(copy.deepcopy(plain()), served, settings, keyed))
        return made

    return build


def _document(found: dict[str, Any], served: Sequence[Served], settings: Settings, keyed: bool) -> dict[str, Any]:
    names = sorted({one.name for one in served})
    versions = sorted({one.version for one in served})
    kinds = {one.model.kind for one in served}
    content: dict[str, Any] = {}
    if "text" in kinds:
        content["application/json"] = {"schema": _texts(settings)}
    if "image" in kinds:
        content["image/png"] = {"schema": _BYTES}  # any image; forms and octets too, whose content no schema can tell from noise
    paths: dict[str, Any] = {}
    for path, methods in found["paths"].items():
        for operation in methods.values():
            operation.get("responses", {}).pop("422", None)
            for parameter in operation.get("parameters", []):
                parameter["schema"] = {"type": "string", "enum": names if parameter["name"] == "name" else versions}
            if path == "/predict":
                operation["requestBody"] = {"required": True, "content": content or {"application/json": {"schema": {}}}}
                operation["parameters"] = [
                    _query("model", {"type": "string", "enum": names}, len(names) > 1),
                    _query("top", {"type": "integer", "minimum": 0, "maximum": 999_999}, False),
                ]
            if keyed and path not in ("/v2/health/live", "/v2/health/ready"):
                operation["security"] = [{"bearer": []}, {"header": []}]
        if path.endswith("/infer"):
            for one in served:  # each model takes tensors of its own, so each has a path of its own
                paths[path.format(name=one.name, version=one.version)] = _infer(methods, one)
        else:
            paths[path] = methods
    found["paths"] = paths
    if keyed:
        found.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
    found.get("components", {}).pop("schemas", None)
    return found


def _infer(methods: dict[str, Any], one: Served) -> dict[str, Any]:
    operation = copy.deepcopy(methods["post"])
    operation.pop("parameters", None)
    operation["operationId"] += f"_{one.name}_{one.version}"
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _request(one)}}}
    return {"post": operation}


def _texts(settings: Settings) -> dict[str, Any]:
    text = {"type": "string", "maxLength": settings.max_text}
    several = {"type": "array", "items": text, "minItems": 1, "maxItems": settings.max_batch}
    single = {"type": "object", "required": ["text"], "properties": {"text": text, "text_pair": text}, "additionalProperties": False}
    return {"oneOf": [single, {"type": "object", "required": ["texts"], "properties": {"texts": several}, "additionalProperties": False}]}


def _query(name: str, schema: Mapping[str, Any], required: bool) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": required, "schema": dict(schema)}


def _request(one: Served) -> dict[str, Any]:
    """A request of one row to this model. The server also takes several rows, nested data and binary tensors."""
    inputs = []
    for port in one.model.inputs:
        shape = [1, *(n if n > 0 else 1 for n in port.shape[1:])]
        count = math.prod(shape)
        number: dict[str, Any] = {"type": "number", "minimum": -PREPARED, "maximum": PREPARED}
        if port.datatype.startswith("INT"):
            most = one.model.vocabulary - 1 if port.name == "input_ids" and one.model.vocabulary else 1
            number = {"type": "integer", "minimum": 0, "maximum": most}
        data = {"type": "array", "items": number, "minItems": count, "maxItems": count}
        fixed = {"name": {"const": port.name}, "datatype": {"const": port.datatype}, "shape": {"const": shape}, "data": data}
        inputs.append({"type": "object", "required": list(fixed), "properties": fixed})
    listed = {"type": "array", "prefixItems": inputs, "minItems": len(inputs), "maxItems": len(inputs)}
    return {
        "title": f"{one.name}, version {one.version}",
        "type": "object",
        "required": ["inputs"],
        "properties": {"id": {"type": "string", "maxLength": 200}, "inputs": listed},
    }
