"""What stands on the page: each section as plain values that the template lays out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import _charts, _curves
from . import _format as fmt
from ._answers import classes, confusions, reliability, samples
from ._charts import Point
from ._deployment import deployment
from ._measures import (
    BY_KEY,
    MEASURES,
    SHARES,
    Cell,
    Chart,
    Measure,
    Table,
    deviation,
    interval,
    measured,
    model_name,
    primary,
    write_primary,
)
from ._read import Run, number, section

__all__ = ["Chart", "Table", "headline", "sections"]

# -- the head -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """The verdict of metrics.json, cut at its first colon for the eye, with the tone that its numbers have.

    ``tone``: ``good`` (the teacher helped), ``unclear`` (the interval includes zero), ``bad`` (it did not help), ``plain`` (nothing to
    compare). ``warning`` must not be overlooked, or is empty.
    """

    opening: str
    rest: str
    tone: str
    warning: str = ""

    @property
    def sentence(self) -> str:
        return f"{self.opening} {self.rest}".strip()


def headline(run: Run) -> Headline:
    sentence = str(run.metrics.get("verdict") or "No verdict is recorded.")
    opening, colon, rest = sentence.partition(": ")
    if not colon or len(opening) > 60:
        opening, rest = sentence, ""
    elif opening.isupper():
        opening = opening.capitalize()
    key = primary(run)
    teacher, baseline, student = (measured(run, role, key) for role in ("teacher", "baseline", "student"))
    poor = teacher is not None and baseline is not None and teacher <= baseline
    warning = (
        "It is no better than the same student trained without it, so there was little to learn: train or choose a better one first."
        if poor
        else ""
    )
    return Headline(f"{opening}{'.' if rest else ''}", f"{rest[:1].upper()}{rest[1:]}", _tone(student, baseline, interval(run)), warning)


def _tone(student: float | None, baseline: float | None, bounds: tuple[float, float] | None) -> str:
    if student is None:
        return "bad"
    if baseline is None:
        return "plain"
    low, high = bounds or (student - baseline,) * 2
    return "good" if low > 0 else "bad" if student <= baseline or high < 0 else "unclear"


def figures(run: Run) -> list[tuple[str, str]]:
    """The few large numbers of the page, each with what it means."""
    key = primary(run)
    student, baseline = measured(run, "student", key), measured(run, "baseline", key)
    if student is None:
        return []
    spread = deviation(run, "student", key)
    several = f", mean of {len(run.metrics.get('seeds') or ())} seeds ± {fmt.fixed(100 * spread, 1)}" if spread is not None else ""
    found = [(write_primary(key)(student), f"test {key.replace('_', ' ')}{' of the student' if 'teacher' in run.roles else ''}{several}")]
    if baseline is not None:
        bounds = interval(run)
        said = f" (95 % interval {fmt.points(bounds[0])} to {fmt.points(bounds[1])})" if bounds else ""
        found.append((fmt.points(student - baseline), f"points against the same student without the teacher{said}"))
    gap = number(run.metrics.get("gap_closed"))
    if gap is not None and gap > 0:
        found.append((fmt.percent(gap, 0), "of the gap between baseline and teacher closed"))
    if "teacher" not in run.roles:
        known = [
            (measured(run, "student", what), BY_KEY[what], meaning)
            for what, meaning in (("parameters", "parameters"), ("p50", "for one item"))
        ]
        found += [(measure.write(value), meaning) for value, measure, meaning in known if value is not None]
    for what, word, opposite in (("parameters", "fewer parameters", "more parameters"), ("p50", "faster", "slower")):
        big, small = measured(run, "teacher", what), measured(run, "student", what)
        if big and small:
            ratio, said = (big / small, word) if big >= small else (small / big, opposite)
            write = BY_KEY[what].write
            found.append((fmt.times(ratio), f"{said} than the teacher: {write(small)} against {write(big)}"))
    return found


def gap(run: Run) -> dict[str, Any] | None:
    """Baseline, student and teacher on one scale, in percent of its width; None where there is nothing to compare."""
    key = primary(run)
    values = {role: value for role in run.roles if (value := measured(run, role, key)) is not None}
    if len(values) < 2 or "student" not in values:
        return None
    bounds = interval(run) if "baseline" in values else None
    around = [values["baseline"] + b for b in bounds] if bounds else []
    low, high = min(*values.values(), *around), max(*values.values(), *around)
    middle, half = (low + high) / 2, max((high - low) / 2, 5e-4)

    def at(value: float) -> float:
        return round(50 + 33 * (value - middle) / half, 2)

    def span(a: float, b: float) -> tuple[float, float]:
        return min(at(a), at(b)), abs(at(a) - at(b))

    write = write_primary(key)
    below = sorted((at(v), role) for role, v in values.items() if role != "student")
    close = len(below) == 2 and below[1][0] - below[0][0] < 26
    return {
        "marks": [(role, at(v)) for role, v in values.items()],
        "labels": [(role, x, write(values[role]), ("left", "right")[i] if close else "mid") for i, (x, role) in enumerate(below)],
        "student": (at(values["student"]), write(values["student"])),
        "whole": span(values["baseline"], values["teacher"]) if {"baseline", "teacher"} <= values.keys() else None,
        "part": span(values["baseline"], values["student"]) if "baseline" in values else None,
        "lost": "baseline" in values and values["student"] < values["baseline"],
        "interval": span(*around) if around else None,
        "summary": "; ".join(f"{role}: {write(v)}" for role, v in values.items()),
    }


# -- numbers --------------------------------------------------------------------------------------------------------------------


def results(run: Run) -> Table:
    rows: list[list[Cell | str]] = []
    for measure in MEASURES:
        values = {role: measured(run, role, measure.key) for role in run.roles}
        known = [v for v in values.values() if v is not None]
        if not known:
            continue
        best = max(known) if measure.better > 0 else min(known)
        marks = measure.better and len(known) > 1 and len(set(known)) > 1
        row: list[Cell | str] = [Cell(measure.name, note=measure.meaning)]
        for role, value in values.items():
            note = _spread(measure, deviation(run, role, measure.key)) if value is not None else ""
            row.append(Cell(measure.write(value), "best" if marks and value == best else "", note))
        rows.append(row)
    return Table(["", *run.roles], rows)


def _spread(measure: Measure, spread: float | None) -> str:
    if not measure.spread or not spread:
        return ""
    return f"± {fmt.fixed(100 * spread, 2) if measure.key in SHARES else fmt.fixed(spread, 4)}"


def members(run: Run) -> Table | None:
    """Several teachers, each for itself."""
    found = run.model("teacher").get("members")
    return _each(found, [f"teacher {i + 1} of {len(found)}" for i in range(len(found))]) if isinstance(found, list) else None


def peers(run: Run) -> Table | None:
    """What learned beside the student, below the student itself."""
    student = run.model("student")
    found = student.get("peers")
    if not isinstance(found, list):
        return None
    own = {**student, "model": model_name(run, "student")}
    return _each([own, *found], ["student", *(f"peer-{i}" for i in range(len(found)))])


def _each(found: list[Any], names: list[str]) -> Table:
    """Models, one a row, by as many measures as a page is wide."""
    models = [section({"m": one}, "m") for one in found]
    narrow = [m for m in MEASURES if m.key not in ("p95", "throughput")]
    shown = [m for m in narrow if any(number(m.value(own)) is not None for own in models)]
    rows: list[list[Cell | str]] = []
    for own, name in zip(models, names, strict=True):
        std = section(own, "metrics_std")
        cells = [Cell(m.write(number(m.value(own))), note=_spread(m, number(std.get(m.key)))) for m in shown]
        rows.append([Cell(name, note=str(own.get("model") or "")), *cells])
    return Table(["", *(m.name for m in shown)], rows)


def data_sentence(run: Run) -> str:
    given = {k: number(v) for k, v in section(run.metrics, "data").items()}
    train, labelled, valid, test = (given.get(k) for k in ("train", "labelled", "valid", "test"))
    if train is None or test is None:
        return ""
    with_label = f" ({fmt.count(labelled)} of them with a label)" if labelled is not None and labelled < train else ""
    chosen = f", watched on {fmt.count(valid)}" if valid else ""
    measured_on = f"measured here on {fmt.count(test)} test items that no model saw in training"
    return f"Trained on {fmt.count(train)} samples{with_label}{chosen}, and {measured_on}."


def seed_table(run: Run) -> Table | None:
    if len(run.children) < 2:
        return None
    key = primary(run)
    write = BY_KEY[key].write if key in BY_KEY else fmt.fixed
    rows: list[list[Cell | str]] = []
    for child in run.children:
        student, baseline = measured(child, "student", key), measured(child, "baseline", key)
        change = fmt.points(student - baseline, 2) if student is not None and baseline is not None else fmt.UNKNOWN
        rows.append(
            [
                child.path.name,
                *(write(measured(child, r, key)) for r in run.roles),
                change,
                fmt.percent(number(child.metrics.get("gap_closed")), 0),
            ]
        )
    return Table(["run", *run.roles, "gain, points", "gap closed"], rows)


def exports(run: Run) -> Table | None:
    rows: list[list[Cell | str]] = []
    for name, record in section(run.metrics, "export").items():
        if isinstance(record, Mapping):
            difference = number(record.get("max_abs_diff"))
            rows.append(
                [
                    name,
                    Cell(str(record.get("file") or fmt.UNKNOWN), "path"),
                    fmt.size(number(record.get("bytes"))),
                    fmt.UNKNOWN if difference is None else f"{difference:.1e}".replace("e-0", "e-").replace("-", "−"),
                    fmt.percent(number(record.get("agreement")), 2),
                    fmt.ms(number(section(record, "latency_ms").get("p50"))),
                    fmt.ms(number(section(record, "latency_ms").get("p95"))),
                ]
            )
    head = ["format", "file", "size", "largest difference", "same answers", "latency p50", "latency p95"]
    return Table(head, rows) if rows else None


def tradeoffs(points: Callable[[str], Sequence[Point]], key: str) -> list[Chart]:
    """Accuracy against latency and against size. ``points`` gives those for which the quantity is known."""
    found = []
    name = key.replace("_", " ")
    for what, label, reading in (
        (
            "p50",
            "latency p50",
            "Up and to the left is better: right more often, in less time. Time is for one item on the machine of this run.",
        ),
        ("bytes", "size", "Up and to the left is better: right more often, with less to store and to load."),
    ):
        dots = points(what)
        if len(dots) < 2:
            continue
        x_format, y_format = BY_KEY[what].write, write_primary(key)
        svg = _charts.scatter(dots, title=f"{name} against {label}", x_label=label, y_label=name, x_format=x_format, y_format=y_format)
        rows = [[p.name, y_format(p.y), x_format(p.x)] for p in dots]
        found.append(Chart(f"{name.capitalize()} against {label}", svg, reading, Table(["model", name, label], rows)))
    return found


def run_points(run: Run, what: str) -> list[Point]:
    key = primary(run)
    return [
        Point(role, role, x, y, deviation(run, role, key))
        for role in run.roles
        if (x := measured(run, role, what)) is not None and (y := measured(run, role, key)) is not None
    ]


# -- training -------------------------------------------------------------------------------------------------------------------


def training(run: Run) -> list[Chart]:
    key = primary(run)
    # A teacher that is fine-tuned first is trained once, by the run itself, for all seeds.
    logs = (("teacher", (run,)), ("baseline", run.seeds), ("student", run.seeds))
    losses = [_curves.losses(runs, role) for role, runs in logs]
    checks = [_curves.validation(runs, role, key) for role, runs in logs]
    errors = [_curves.validation(runs, role, "nll") for role, runs in logs]
    parts = _curves.terms(run.seeds)
    seeds = " Faint lines are single seeds, the strong one is their mean." if len(run.seeds) > 1 else ""
    return [
        chart
        for chart in (
            curve_chart(
                f"Validation {key}",
                [c for c in checks if c],
                key,
                write_primary(key),
                "Measured after each epoch on data that no model was trained on. Higher is better; a curve that falls late is overfitting."
                + seeds,
            ),
            curve_chart(
                "Training loss",
                [c for c in losses if c],
                "loss",
                "{:.3g}".format,
                "What each training minimised. The student's sum has other terms than the baseline's, so compare shapes, not heights."
                + seeds,
            ),
            curve_chart(
                "Loss terms of the student",
                parts if len(parts) > 1 else [],
                "term",
                "{:.3g}".format,
                "Each term before its weight. A term that does not fall is not learned, or pulls against another." + seeds,
            ),
            curve_chart(
                "Weights of the student's terms",
                _curves.weights(run.seeds),
                "weight",
                "{:.3g}".format,
                "What each term was multiplied by: a schedule, or what weight: auto found." + seeds,
            ),
            curve_chart(
                "Validation NLL",
                [c for c in errors if c],
                "NLL",
                "{:.3g}".format,
                "Lower is better. Rising while the accuracy holds means growing overconfidence." + seeds,
            ),
        )
        if chart
    ]


def curve_chart(title: str, found: Sequence[_curves.Curve], y_label: str, y_format: Callable[[float], str], reading: str) -> Chart | None:
    """None where nothing was logged."""
    drawn = [line for curve in found if len((line := _curves.line(curve)).bold[0])]
    if not drawn:
        return None
    svg = _charts.lines(
        drawn, title=title, x_label="step", y_label=y_label.replace("_", " "), y_format=y_format, x_format=lambda x: f"{x:,.0f}"
    )
    steps = sorted({x for line in drawn for x in line.bold[0]})
    steps = steps[:: -(-len(steps) // 20)] if len(steps) > 24 else steps
    values = [dict(zip(*line.bold, strict=True)) for line in drawn]
    rows = [[f"{step:,.0f}", *(y_format(v[step]) if step in v else fmt.UNKNOWN for v in values)] for step in steps]
    return Chart(title, svg, reading, Table(["step", *(line.name for line in drawn)], rows), [(line.name, line.style) for line in drawn])


# -- the rest -------------------------------------------------------------------------------------------------------------------


def cost(run: Run) -> dict[str, Any] | None:
    given = {k: number(v) for k, v in section(run.metrics, "cost").items()}
    parts = [
        (name, style, seconds)
        for name, style, seconds in (
            ("asking the teacher", "teacher", given.get("teacher_seconds")),
            ("training the student", "student", given.get("train_seconds")),
            ("training the baseline", "baseline", given.get("baseline_seconds")),
        )
        if seconds
    ]
    total = given.get("total_seconds")
    known = sum(seconds for _, _, seconds in parts)
    if total is not None and total > known > 0:
        parts.append(("everything else", "rest", total - known))
    facts = [
        ("in all", fmt.seconds(total)),
        ("peak memory", fmt.size(given.get("peak_rss_bytes"))),
        ("items that the teacher was asked", fmt.count(given.get("teacher_items"))),
        ("teacher answers from the cache", fmt.count(given.get("cache_hits"))),
    ]
    facts = [(name, value) for name, value in facts if value != fmt.UNKNOWN]
    whole = sum(seconds for _, _, seconds in parts) or 1.0
    bars = [(name, style, fmt.seconds(s), 100 * s / whole) for name, style, s in parts]
    return {"bars": bars, "facts": facts} if bars or facts else None


def flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    """Nested mappings as dotted keys with readable values."""
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            for i, entry in enumerate(value):
                yield from flat(entry, f"{name}.{i}.")
        else:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def answers_of(run: Run) -> str:
    """Whose answers the sections below the curves show, where there are several seeds."""
    best = run.metrics.get("best_seed")
    if not run.children:
        return ""
    return f"Of the run with seed {best}, the best on validation." if best is not None else "Of one of the seeds."


def notes(run: Run) -> list[str]:
    every = [*(run.metrics.get("notes") or ()), *(n for child in run.children for n in child.metrics.get("notes") or ())]
    return list(dict.fromkeys(str(note) for note in every))


def sections(run: Run) -> dict[str, Any]:
    """Everything that the page of one run shows."""
    return {
        "run": run,
        "verdict": headline(run),
        "figures": figures(run),
        "gap": gap(run),
        "distilled": "teacher" in run.roles,
        "models": {"teacher": model_name(run, "teacher"), "student": model_name(run, "student")},
        "results": results(run),
        "members": members(run),
        "peers": peers(run),
        "data": data_sentence(run),
        "method": section(run.metrics, "interval").get("method"),
        "seeds": seed_table(run),
        "exports": exports(run),
        "deployment": deployment(run),
        "tradeoffs": tradeoffs(partial(run_points, run), primary(run)),
        "training": training(run),
        "reliability": reliability(run),
        "classes": classes(run),
        "answers_of": answers_of(run),
        "confusions": confusions(run),
        "samples": samples(run),
        "disagree": section(run.analysis, "samples").get("disagree"),
        "items": run.analysis.get("items"),
        "cost": cost(run),
        "environment": list(flat(run.environment)),
        "notes": notes(run),
    }
