"""What could be deployed, on one picture: accuracy against the time of one item, with the bytes as the area of a dot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import _charts
from . import _format as fmt
from ._charts import Bubble
from ._measures import BY_KEY, Chart, Table, measured, primary, write_primary
from ._read import Run, number, section

__all__ = ["deployment"]

_STYLES = {"ONNX Runtime": "s2", "TorchScript": "s6", "torch.export": "s3"}


@dataclass(frozen=True)
class _Candidate:
    name: str
    runtime: str
    style: str
    accuracy: float
    p50: float
    bytes: float
    threads: float | None
    throughput: float | None
    peak: float | None


def deployment(run: Run) -> Chart | None:
    """None where no exported file has an accuracy of its own, which `limbeck export` measures."""
    key = primary(run)
    files = list(_files(run, key))
    if not files:
        return None
    found = [*_roles(run, key), *files]
    best = _front(found)
    write = write_primary(key)
    dots = [
        Bubble(
            c.name,
            c.style,
            c.p50,
            c.accuracy,
            c.bytes,
            f"{c.name} ({c.runtime})\n{key} {write(c.accuracy)}\nlatency p50 {fmt.ms(c.p50)}\n{fmt.size(c.bytes)}",
            c in best,
        )
        for c in found
    ]
    name = key.replace("_", " ")
    svg = _charts.bubbles(
        dots, title="What to deploy", x_label="latency p50 of one item", y_label=f"test {name}", x_format=fmt.ms, y_format=write
    )
    rows = [
        [
            c.name + (" ●" if c in best else ""),
            c.runtime,
            fmt.percent(c.accuracy, 2) if write is fmt.percent else write(c.accuracy),
            fmt.ms(c.p50),
            fmt.count(c.threads),
            fmt.size(c.bytes),
            BY_KEY["throughput"].write(c.throughput),
            fmt.size(c.peak),
        ]
        for c in found
    ]
    head = ["what (● on the front)", "runtime", name, "latency p50", "threads", "size", "throughput", "peak memory"]
    reading = (
        "Up and to the left is better; a larger dot has more bytes. What lies under the green stair is no faster and no more accurate than one of "
        "its corners, the Pareto front. Each accuracy was measured in that runtime, on the test split. Files run on one CPU thread; models in "
        "PyTorch on as many as their run had, so look at the threads before you compare the two."
    )
    if len(run.metrics.get("seeds") or ()) > 1:
        reading += " Models in PyTorch are means over the seeds; files are of the seed whose student is exported."
    legend = [(runtime, style) for runtime, style in _STYLES.items() if any(c.runtime == runtime for c in found)]
    return Chart("What to deploy", svg, reading, Table(head, rows), legend if len(legend) > 1 else ())


def _roles(run: Run, key: str) -> Iterator[_Candidate]:
    for role in run.roles:
        model = run.model(role)
        accuracy, p50, size = (measured(run, role, what) for what in (key, "p50", "bytes"))
        if accuracy is not None and p50 and size:
            threads = number(section(model, "latency_ms").get("threads"))
            throughput = number(BY_KEY["throughput"].value(model))
            yield _Candidate(role, "PyTorch", role, accuracy, p50, size, threads, throughput, None)


def _files(run: Run, key: str) -> Iterator[_Candidate]:
    """Exports that were measured, the same bytes once; for a quantised one without it also the float32 file that it was made of."""
    records = {name: r for name, r in section(run.metrics, "export").items() if isinstance(r, Mapping)}
    seen: set[Any] = set()
    before = {f"{name} before": _float32(record) for name, record in records.items()}
    for name, record in {**records, **before}.items():
        candidate = _file(name, record, key)
        if candidate is None or record.get("sha256") in seen:
            continue
        seen.add(record.get("sha256"))
        yield candidate


def _float32(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the file that a quantised one was made of; empty where there is none."""
    found = section(record, "quantization", "float32")
    return {**found, "runtime": record.get("runtime"), "threads": record.get("threads")} if found else {}


def _file(name: str, record: Mapping[str, Any], key: str) -> _Candidate | None:
    accuracy = number(section(record, "test", "metrics").get(key))
    p50, size = number(section(record, "latency_ms").get("p50")), number(record.get("bytes"))
    if accuracy is None or not p50 or not size:
        return None
    shown = "onnx" if name.endswith(" before") else name
    runtime = str(record.get("runtime") or fmt.UNKNOWN)
    throughput = number(section(record, "throughput").get("items_per_second"))
    threads, peak = number(record.get("threads")), number(record.get("peak_rss_bytes"))
    return _Candidate(shown, runtime, _STYLES.get(runtime, "s4"), accuracy, p50, size, threads, throughput, peak)


def _front(candidates: list[_Candidate]) -> list[_Candidate]:
    """Those that no other is at least as fast and as accurate as, and better in one."""

    def beaten(c: _Candidate) -> bool:
        return any(o.p50 <= c.p50 and o.accuracy >= c.accuracy and (o.p50, o.accuracy) != (c.p50, c.accuracy) for o in candidates)

    return [c for c in candidates if not beaten(c)]
