"""The Open Inference Protocol, version 2: requests to arrays and answers to bytes, with and without the binary tensor extension.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol (rules of binary tensors: Triton's extension_binary_data).
No web framework here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.serve._model import DTYPES, Arrays, Port, Refused, ServedModel

__all__ = ["PREPARED", "Asked", "answer", "metadata", "parse_json", "read"]


PREPARED = 10_000
"""No normalised pixel is larger than this."""


@dataclass(frozen=True)
class Asked:
    """A request: its arrays, its own id, and whether the logits go back as bytes."""

    arrays: Arrays
    id: str | None
    binary: bool


def metadata(model: ServedModel, name: str, versions: list[str]) -> dict[str, Any]:
    """What ``GET /v2/models/NAME`` says."""
    return {
        "name": name,
        "versions": versions,
        "platform": "onnxruntime_onnx",
        "inputs": [_port(port) for port in model.inputs],
        "outputs": [_port(port) for port in model.outputs if port.name == "logits"],
    }


def _port(port: Port) -> dict[str, Any]:
    return {"name": port.name, "datatype": port.datatype, "shape": list(port.shape)}


def parse_json(body: bytes) -> dict[str, Any]:
    """One JSON object. Raises: Refused."""

    def no_such(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=no_such)
    except RecursionError:
        raise Refused("the body is nested too deep.") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, whole numbers of too many digits
        raise Refused(f"the body is not JSON: {str(error)[:200]}.") from None
    if not isinstance(value, dict):
        raise Refused("the body must be a JSON object.")
    return value


def read(body: bytes, header_length: str | None, model: ServedModel, max_batch: int) -> Asked:
    """An inference request for ``model``. header_length: the header ``Inference-Header-Content-Length``: bytes of JSON before the tensors.

    Raises: Refused.
    """
    size = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12 and int(header_length) <= len(body)):
            raise Refused(f"Inference-Header-Content-Length is '{header_length[:20]}', and the body has {len(body)} bytes.")
        size = int(header_length)
    head, blobs = parse_json(body[:size]), memoryview(body)[size:]
    given = head.get("inputs")
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise Refused("'inputs' must be a list of tensors, each with name, shape, datatype and data.")
    names = [str(one.get("name")) for one in given]
    wanted = {port.name: port for port in model.inputs}
    if sorted(names) != sorted(wanted):
        raise Refused(f"the model has the inputs {', '.join(wanted)}, and {', '.join(names)[:200]} were given.")
    arrays: Arrays = {}
    for one in given:
        array, blobs = _tensor(one, wanted[one["name"]], blobs)
        arrays[one["name"]] = array
    if len(blobs):
        raise Refused(f"{len(blobs)} bytes follow the last tensor.")
    rows = {len(array) for array in arrays.values()}
    if len(rows) != 1:
        raise Refused("all inputs must have the same first dimension, the batch.")
    if not 1 <= rows.pop() <= max_batch:
        raise Refused(f"a request may have 1 to {max_batch} rows.")
    if model.kind == "text":
        _same_length(arrays, model.max_length)
        if not all(((array >= 0) & (array <= 1)).all() for name, array in arrays.items() if name != "input_ids"):
            raise Refused("a mask and token types are 0 or 1.")
        ids = arrays.get("input_ids")
        if ids is not None and (ids.min() < 0 or (model.vocabulary is not None and ids.max() >= model.vocabulary)):
            raise Refused(
                f"the tokens of 'input_ids' are numbers from 0{'' if model.vocabulary is None else f' to {model.vocabulary - 1:,}'}."
            )
    if model.kind == "image" and max(np.abs(array).max() for array in arrays.values()) > PREPARED:
        raise Refused(f"images that are not prepared: normalised pixels lie within {PREPARED:,}. /predict takes image files.")
    asked_id = head.get("id")
    if "id" in head and not (isinstance(asked_id, str) and len(asked_id) <= 200):
        raise Refused("'id' must be a text of at most 200 characters.")
    return Asked({port.name: arrays[port.name] for port in model.inputs}, asked_id, _wants_bytes(head))


def _tensor(one: dict[str, Any], port: Port, blobs: memoryview) -> tuple[npt.NDArray[Any], memoryview]:
    """The array of one input, and what is left of the bytes behind the JSON."""
    name, shape = port.name, one.get("shape")
    if one.get("datatype") != port.datatype:
        raise Refused(f"input '{name}' has the datatype {port.datatype}, and {str(one.get('datatype'))[:20]} was given.")
    if not isinstance(shape, list) or not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 31 for n in shape):
        raise Refused(f"input '{name}': 'shape' must be a list of whole numbers above 0.")
    if len(shape) != len(port.shape) or any(wanted not in (-1, n) for wanted, n in zip(port.shape, shape, strict=True)):
        raise Refused(f"input '{name}' has the shape {list(port.shape)} (-1: free), and {str(shape)[:100]} was given.")
    dtype = np.dtype(DTYPES[port.datatype])
    count = math.prod(shape)
    parameters = one.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Refused(f"input '{name}': 'parameters' must be an object.")
    if "shared_memory_region" in parameters:
        raise Refused("shared memory is not offered; send the tensors in the body.")
    size = parameters.get("binary_data_size")
    if size is not None:
        if "data" in one:
            raise Refused(f"input '{name}' has both 'data' and 'binary_data_size'.")
        if not isinstance(size, int) or isinstance(size, bool) or size != count * dtype.itemsize:
            raise Refused(f"input '{name}' of shape {shape} has {count * dtype.itemsize} bytes, and binary_data_size is {str(size)[:20]}.")
        if size > len(blobs):
            raise Refused(f"input '{name}': {len(blobs)} bytes are left of the body, and {size} are wanted.")
        array = np.frombuffer(blobs[:size], dtype=dtype.newbyteorder("<")).astype(dtype, copy=False)
        blobs = blobs[size:]
    else:
        array = _numbers(name, one.get("data"), count, dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise Refused(f"input '{name}' holds NaN or infinite values.")
    return array.reshape(shape), blobs


def _numbers(name: str, data: Any, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A flat or nested list of numbers, in row-major order."""
    if not isinstance(data, list):
        raise Refused(f"input '{name}' has neither 'data', a list, nor 'binary_data_size'.")
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError, RecursionError):
        raise Refused(f"input '{name}': 'data' must be a list of numbers, flat or nested evenly.") from None
    if dtype.kind == "i" and array.dtype.kind == "f" and (np.abs(array) < 2**53).all() and (array == np.rint(array)).all():
        array = array.astype(dtype)  # JSON has one kind of number: 3.0 is 3
    kinds = "iu" if dtype.kind == "i" else "iuf"
    if array.dtype.kind not in kinds:
        raise Refused(f"input '{name}': 'data' must hold {'whole numbers' if dtype.kind == 'i' else 'numbers'} alone.")
    if array.size != count:
        raise Refused(f"input '{name}': 'data' has {array.size} values, and the shape has {count}.")
    if dtype.kind == "i" and array.dtype.kind == "u":
        raise Refused(f"input '{name}' holds numbers beyond {dtype}.")
    with np.errstate(over="ignore"):
        return array.astype(dtype).ravel()


def _same_length(arrays: Arrays, longest: int | None) -> None:
    lengths = {array.shape[1] for array in arrays.values()}
    if len(lengths) != 1:
        raise Refused("all inputs must have the same length.")
    length = lengths.pop()
    if longest is not None and length > longest:
        raise Refused(f"the inputs are {length} tokens long, and the model takes at most {longest}.")


def _wants_bytes(head: dict[str, Any]) -> bool:
    """Whether the logits are asked for as bytes: for this output, or for all."""
    parameters, outputs = head.get("parameters", {}), head.get("outputs")
    if not isinstance(parameters, dict):
        raise Refused("'parameters' must be an object.")
    binary = parameters.get("binary_data_output", False)
    if outputs is not None:
        if not isinstance(outputs, list) or not all(isinstance(one, dict) for one in outputs):
            raise Refused("'outputs' must be a list of objects with a name.")
        for one in outputs:
            if one.get("name") != "logits":
                raise Refused(f"the model has the output logits, and '{str(one.get('name'))[:50]}' was asked for.")
            own = one.get("parameters", {})
            if not isinstance(own, dict):
                raise Refused("output 'logits': 'parameters' must be an object.")
            for unknown in ("classification", "shared_memory_region"):
                if unknown in own:
                    raise Refused(f"output 'logits': '{unknown}' is not offered.")
            binary = own.get("binary_data", binary)
    if not isinstance(binary, bool):
        raise Refused("'binary_data' and 'binary_data_output' must be true or false.")
    return binary


def answer(logits: npt.NDArray[Any], asked: Asked, name: str, version: str) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the response. Raises: Refused, where the logits are not finite and JSON was asked for."""
    floats = np.ascontiguousarray(logits, dtype="<f4")
    output: dict[str, Any] = {"name": "logits", "datatype": "FP32", "shape": list(floats.shape)}
    head: dict[str, Any] = {
        "model_name": name,
        "model_version": version,
        **({} if asked.id is None else {"id": asked.id}),
        "outputs": [output],
    }
    if asked.binary:
        blob = floats.tobytes()
        output["parameters"] = {"binary_data_size": len(blob)}
        text = json.dumps(head).encode()
        return text + blob, {"content-type": "application/octet-stream", "inference-header-content-length": str(len(text))}
    if not np.isfinite(floats).all():
        raise Refused("the model's answer to these inputs is not finite.")
    output["data"] = floats.ravel().tolist()
    return json.dumps(head).encode(), {"content-type": "application/json"}
