"""Three ways to write an ONNX file in fewer bits, each with the nodes that it changes and what a single one of them costs.

All three are ONNX Runtime's own tools. A method gets the float32 file after constants and batch normalisation were folded (:func:`prepared`).
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["HALF", "Dynamic", "Feeds", "Half", "Method", "Static", "method_for", "prepared"]

Feeds = Mapping[str, npt.NDArray[Any]]
"""One batch of prepared inputs by name."""

HALF = 65504.0
"""The largest finite float16."""

# Integer kernels exist for these, or they hand 8-bit values on. Softmax, normalisations and look-ups stay in float.
_STATIC = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool",
    "GlobalAveragePool", "Concat", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Split", "Slice", "Pad", "Resize",
)  # fmt: skip
# Of these, what rounds by itself. The others follow the node before them.
_ROUNDING = frozenset(
    [
        "Conv",
        "ConvTranspose",
        "Gemm",
        "MatMul",
        "Add",
        "Mul",
        "LeakyRelu",
        "Sigmoid",
        "AveragePool",
        "GlobalAveragePool",
        "Concat",
        "Resize",
    ]
)
_RECURRENT = frozenset(["LSTM", "GRU", "RNN"])
_ATTENTION = frozenset(["Attention", "MultiHeadAttention"])


class Method(Protocol):
    """One way to write a file in fewer bits."""

    name: str
    candidates: tuple[str, ...]
    """The nodes that it changes, which may be left as they are, in the order of the file."""
    unfit: frozenset[str]
    """Of them, those that cannot be changed at all."""

    def write(self, left: Set[str], out: Path) -> None:
        """The file with all candidates changed but those in ``left``."""

    def ranked(self) -> list[str]:
        """All candidates, those first that cost most."""


def prepared(path: Path, out: Path) -> None:
    """The same network with constants and batch normalisation folded, shapes inferred, and a name of its own for every node."""
    import onnx

    with _same_path():
        from onnxruntime.quantization.shape_inference import quant_pre_process

    # Symbolic shapes are left out: where they fail, which they often do, the tool leaves files in the working directory.
    for less in ({}, {"skip_optimization": True}):
        with contextlib.suppress(Exception):
            quant_pre_process(str(path), str(out), skip_symbolic_shape=True, **less)
            break
    model = onnx.load(str(out if out.is_file() else path))
    taken: set[str] = set()
    for number, node in enumerate(model.graph.node):
        node.name = node.name if node.name and node.name not in taken else f"{node.op_type}_{number}"
        taken.add(node.name)
    onnx.save(model, str(out))


def method_for(scheme: str, path: Path, calibration: Sequence[Feeds], work: Path) -> tuple[Method, str]:
    """The method that a scheme stands for on a prepared file, and a sentence on why.

    scheme: ``int8`` (chosen by the operators), ``int8-static``, ``int8-dynamic`` or ``fp16``. calibration: batches of training samples. work: a
    folder for files of its own.
    """
    if scheme == "fp16":
        return Half(path, calibration), "Half precision was asked for."
    if scheme != "int8":
        static = scheme == "int8-static"
        return (Static if static else Dynamic)(path, calibration, work), f"{'Static' if static else 'Dynamic'} quantisation was asked for."
    dynamic, why = _by_operators(path)
    return (Dynamic if dynamic else Static)(path, calibration, work), why


def _by_operators(path: Path) -> tuple[bool, str]:
    """Whether ranges should be taken of each batch as it comes: ONNX Runtime advises that for transformers and recurrent networks."""
    import onnx

    graph = onnx.load(str(path)).graph
    sizes = {t.name: int(np.prod(t.dims)) for t in graph.initializer}
    of_conv = sum(sizes.get(n.input[1], 0) for n in graph.node if n.op_type in ("Conv", "ConvTranspose"))
    of_products = sum(sum(sizes.get(i, 0) for i in n.input) for n in graph.node if n.op_type in ("MatMul", "Gemm", "Gather", *_RECURRENT))
    attention = sum(n.op_type in _ATTENTION or (n.op_type == "MatMul" and not sizes.keys() & set(n.input)) for n in graph.node)
    recurrent = sum(n.op_type in _RECURRENT for n in graph.node)
    tables = sum(n.op_type == "Gather" and sizes.get(n.input[0], 0) > 1 and _is_float(graph, n.input[0]) for n in graph.node)
    if (attention or recurrent or tables) and of_products > of_conv:
        has = [
            f"{count} {what}"
            for count, what in (
                (attention, "products of two activations (attention)"),
                (recurrent, "recurrent layers"),
                (tables, "look-ups in float tables"),
            )
            if count
        ]
        return True, f"Dynamic: the graph has {' and '.join(has)}, and most of its weights are in matrix products."
    held = [
        (sum(n.op_type in kinds for n in graph.node), what)
        for kinds, what in ((("Conv", "ConvTranspose"), "convolutions"), (("MatMul", "Gemm"), "matrix products"))
    ]
    told = " and ".join(f"{count} {what}" for count, what in held if count) or "no weights"
    return False, f"Static: the graph has {told}, and no attention, recurrence or tables that outweigh them."


def _is_float(graph: Any, name: str) -> bool:
    import onnx

    return any(t.name == name and t.data_type == onnx.TensorProto.FLOAT for t in graph.initializer)


class _Integer:
    """What static and dynamic share: a node costs what it alone changes in the logits."""

    name: str
    candidates: tuple[str, ...]
    unfit: frozenset[str] = frozenset()

    def __init__(self, path: Path, calibration: Sequence[Feeds], work: Path) -> None:
        self.path, self.calibration, self.work = path, calibration, work

    def write(self, left: Set[str], out: Path) -> None:
        raise NotImplementedError

    def ranked(self) -> list[str]:
        probe = self.calibration[:2]
        exact = _logits(self.path, probe)
        every = frozenset(self.candidates)
        errors: dict[str, float] = {}
        alone = self.work / "alone.onnx"
        for node in self.candidates:
            try:
                self.write(every - {node}, alone)
                error = float(np.mean((_logits(alone, probe) - exact) ** 2))
            except Exception:  # a node that cannot even run in 8 bits
                error = float("inf")
            errors[node] = error if np.isfinite(error) else float("inf")
        alone.unlink(missing_ok=True)
        return sorted(self.candidates, key=lambda n: -errors[n])


class Static(_Integer):
    """Ranges of activations from training samples, weights by channel, as pairs of QuantizeLinear and DequantizeLinear.

    Weights take 7 bits: without VNNI x86 processors add two products of 8 bits in 16, which may overflow, and the accuracy that is seen here would
    not be that of another machine.
    """

    name = "static"

    def __init__(self, path: Path, calibration: Sequence[Feeds], work: Path) -> None:
        import onnx

        super().__init__(path, calibration, work)
        self.candidates = tuple(n.name for n in onnx.load(str(path), load_external_data=False).graph.node if n.op_type in _ROUNDING)

    def write(self, left: Set[str], out: Path) -> None:
        with _same_path():
            from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        more: dict[str, Any] = {}
        if "calibration_cache_path" in inspect.signature(quantize_static).parameters:  # ONNX Runtime 1.24 or so: measured once
            more["calibration_cache_path"] = str(self.work / "ranges.json")
        quantize_static(
            str(self.path),
            str(out),
            _Reader(self.calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_STATIC),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(left),
            **more,
        )


class Dynamic(_Integer):
    """Weights of matrix products (by column) and tables in 8 bits; the range of an activation is taken as it comes."""

    name = "dynamic"

    def __init__(self, path: Path, calibration: Sequence[Feeds], work: Path) -> None:
        import onnx
        from onnxruntime.quantization.onnx_model import ONNXModel

        plain = ONNXModel(onnx.load(str(path)))
        plain.replace_gemm_with_matmul()  # it would do so by itself, and give nodes other names than are left out
        model = plain.model
        used = {name for node in model.graph.node for name in node.input}
        kept = [t for t in model.graph.initializer if t.name in used]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        super().__init__(work / "products.onnx", calibration, work)
        onnx.save(model, str(self.path))
        tables = {t.name for t in kept if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1}
        weighted = {"MatMul": 1, "Gather": 0, "LSTM": 1}
        self.candidates = tuple(n.name for n in model.graph.node if n.op_type in weighted and n.input[weighted[n.op_type]] in tables)

    def write(self, left: Set[str], out: Path) -> None:
        with _same_path():
            from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            str(self.path),
            str(out),
            op_types_to_quantize=["MatMul", "Gather", "LSTM"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(left),
            extra_options={"MatMulConstBOnly": True},
        )


class Half:
    """float16 between float32 inputs and outputs. A node costs the largest value that it takes or gives: float16 ends at 65,504.

    On a CPU ONNX Runtime computes such nodes in float32, and may leave out casts in between, so a value beyond that would not be seen in the
    accuracy; such nodes are left in float32 from the start.
    """

    name = "fp16"

    def __init__(self, path: Path, calibration: Sequence[Feeds]) -> None:
        import onnx

        self.path = path
        model = onnx.load(str(path))
        sizes = _largest_values(model, calibration[:2])
        self._cost = {n.name: max((sizes.get(v, 0.0) for v in (*n.input, *n.output)), default=0.0) for n in model.graph.node}
        self.candidates = tuple(n.name for n in model.graph.node if any(v in sizes for v in n.output))
        self.unfit = frozenset(n for n in self.candidates if not self._cost[n] < HALF)

    def write(self, left: Set[str], out: Path) -> None:
        import onnx

        with _same_path():
            from onnxruntime.quantization.onnx_model import ONNXModel
            from onnxruntime.transformers.float16 import convert_float_to_float16 as convert

        source = onnx.load(str(self.path))
        own = {node.name for node in source.graph.node}
        made = ONNXModel(convert(source, keep_io_types=True, node_block_list=sorted(left)))
        _join(made.model.graph, own)
        del made.model.graph.value_info[:]  # types that were true before
        made.topological_sort()  # its casts stand at the end
        onnx.save(made.model, str(out))

    def ranked(self) -> list[str]:
        return sorted(self.candidates, key=lambda n: -self._cost[n])


def _join(graph: Any, own: Set[str]) -> None:
    """Between two nodes in float32 the converter puts a cast to float16 and one back, which would cut off the very values that they were left for.

    own: the names of nodes that were there before.
    """
    import onnx

    def casts(to: int) -> Iterator[Any]:
        return (n for n in graph.node if n.op_type == "Cast" and n.name not in own and n.attribute[0].i == to)

    narrowed = {n.output[0]: n.input[0] for n in casts(onnx.TensorProto.FLOAT16)}
    back = {n.output[0]: narrowed[n.input[0]] for n in casts(onnx.TensorProto.FLOAT) if n.input[0] in narrowed}
    outputs = {v.name for v in graph.output}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in back and node.name in own:
                node.input[i] = back[name]
    used = {name for node in graph.node for name in node.input} | outputs
    for ends in (back, narrowed):
        kept = [n for n in graph.node if not (n.op_type == "Cast" and n.output[0] in ends and n.output[0] not in used)]
        del graph.node[:]
        graph.node.extend(kept)
        used = {name for node in graph.node for name in node.input} | outputs


@contextlib.contextmanager
def _same_path() -> Iterator[None]:
    """ONNX Runtime's ``transformers`` package, which some of its quantisation imports, adds a folder with names such as ``models`` to the search
    path; it is put back."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before


def _largest_values(model: Any, batches: Sequence[Feeds]) -> dict[str, float]:
    """The largest magnitude of every float32 tensor of a model, weights included; NaN counts as infinite."""
    import onnx

    known = {t.name: float(np.abs(onnx.numpy_helper.to_array(t)).max(initial=0.0)) for t in _floats(model.graph.initializer)}
    seen = onnx.ModelProto()
    seen.CopyFrom(onnx.shape_inference.infer_shapes(model))
    there = {v.name for v in seen.graph.output}
    typed = [v for v in seen.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and v.name not in there]
    outputs = {name for node in seen.graph.node for name in node.output}
    added = [onnx.helper.make_tensor_value_info(v.name, onnx.TensorProto.FLOAT, None) for v in typed if v.name in outputs]
    seen.graph.output.extend(added)
    session = _session(seen.SerializeToString(), optimise=False)
    names = [value.name for value in session.get_outputs()]
    for feeds in batches:
        for name, value in zip(names, session.run(names, dict(feeds)), strict=True):
            largest = float(np.nan_to_num(np.abs(value), nan=np.inf).max(initial=0.0))
            known[name] = max(known.get(name, 0.0), largest)
    return known


def _floats(tensors: Any) -> Iterator[Any]:
    import onnx

    return (t for t in tensors if t.data_type == onnx.TensorProto.FLOAT)


def _session(source: str | bytes, *, optimise: bool = True) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _logits(path: Path, batches: Sequence[Feeds]) -> npt.NDArray[np.float64]:
    session = _session(str(path))
    return np.concatenate([np.asarray(session.run(["logits"], dict(feeds))[0], dtype=np.float64) for feeds in batches])


class _Reader:
    """Batches one by one, then None, as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Sequence[Feeds]) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        found = next(self._left, None)
        return None if found is None else dict(found)
