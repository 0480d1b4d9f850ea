"""What is measured of a model and how it is written; the shapes in which sections hand values to the template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from . import _format as fmt
from ._read import Run, number, section

SHARES = {"accuracy", "macro_f1", "agreement"}


@dataclass(frozen=True)
class Cell:
    text: str
    style: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]


@dataclass(frozen=True)
class Chart:
    """A drawing, how to read it, its legend as (name, style), and its numbers."""

    title: str
    svg: Markup
    reading: str
    table: Table
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Measure:
    """A row of the results: where its value stands, how it is written, which way is better (1 up, -1 down, 0 neither)."""

    key: str
    name: str
    write: Callable[[float | None], str]
    better: int
    meaning: str
    value: Callable[[Mapping[str, Any]], Any]
    spread: bool = False


def _metric(key: str, name: str, better: int, meaning: str) -> Measure:
    write = partial(fmt.percent, digits=2) if key in SHARES else partial(fmt.fixed, digits=4)

    def value(model: Mapping[str, Any]) -> Any:
        return section(model, "metrics").get(key, model.get(key))

    return Measure(key, name, write, better, meaning, value, spread=True)


def _throughput(model: Mapping[str, Any]) -> Any:
    found = model.get("throughput")
    return found.get("items_per_second") if isinstance(found, Mapping) else found


MEASURES = (
    _metric("accuracy", "accuracy", 1, "share of test items answered correctly"),
    _metric("macro_f1", "macro F1", 1, "F1 averaged over classes: every class counts the same, however rare"),
    _metric("nll", "NLL", -1, "negative log-likelihood of the true class: punishes confident mistakes"),
    _metric("ece", "ECE", -1, "expected calibration error: how far confidence is from being right"),
    _metric("agreement", "agreement", 1, "share of test items answered as the teacher does, right or wrong"),
    Measure("parameters", "parameters", fmt.si, -1, "trained numbers in the model", lambda m: m.get("parameters")),
    Measure("bytes", "size", fmt.size, -1, "weights as stored", lambda m: m.get("bytes")),
    Measure("flops", "FLOPs", fmt.si, -1, "floating-point operations for one item, as torch counts them", lambda m: m.get("flops")),
    Measure(
        "p50", "latency p50", fmt.ms, -1, "one item at a time: half of all calls are faster", lambda m: section(m, "latency_ms").get("p50")
    ),
    Measure(
        "p95", "latency p95", fmt.ms, -1, "one item at a time: 95 % of all calls are faster", lambda m: section(m, "latency_ms").get("p95")
    ),
    Measure(
        "throughput",
        "throughput",
        lambda x: fmt.UNKNOWN if x is None else f"{fmt.si(x)}/s",
        1,
        "items a second in large batches",
        _throughput,
    ),
)
BY_KEY = {measure.key: measure for measure in MEASURES}


def primary(run: Run) -> str:
    return str(run.metrics.get("primary_metric") or "accuracy")


def write_primary(key: str) -> Callable[[float | None], str]:
    return fmt.percent if key in SHARES else fmt.fixed


def measured(run: Run, role: str, key: str) -> float | None:
    model = run.model(role)
    return number(BY_KEY[key].value(model)) if key in BY_KEY else number(section(model, "metrics").get(key))


def deviation(run: Run, role: str, key: str) -> float | None:
    model = run.model(role)
    return number((section(model, "metrics_std") or section(model, "std")).get(key))


def model_name(run: Run, role: str) -> str:
    """The model as the recipe names it, or the role's own word."""
    given = run.recipe.get("teacher" if role == "teacher" else "student")
    if isinstance(given, list):
        return " + ".join(str(section({"m": m}, "m").get("model") or m) for m in given)
    return str(section({"m": given}, "m").get("model") or given or "")


def interval(run: Run) -> tuple[float, float] | None:
    given = section(run.metrics, "interval").get("student_minus_baseline")
    bounds = [number(b) for b in given] if isinstance(given, list) and len(given) == 2 else []
    return (bounds[0], bounds[1]) if len(bounds) == 2 and bounds[0] is not None and bounds[1] is not None else None
