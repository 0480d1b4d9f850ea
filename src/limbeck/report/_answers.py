"""What the models answered: calibration, classes, confusions, and the items on which student and teacher differ."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from . import _charts
from . import _format as fmt
from ._measures import Chart, Table
from ._read import Run, number, section

__all__ = ["classes", "confusions", "reliability", "samples"]

CLASS_ROWS = 12
"""Of more classes than twice this, the worst and the best."""
ALL_CLASSES = 30
FEW = 5
"""Of many classes, those with fewer test items are left out: they fill both ends by chance."""
TEXT_LIMIT = 420
NAME_LIMIT = 70


def reliability(run: Run) -> list[Chart]:
    found = []
    for role in ("teacher", "baseline", "student"):
        model = section(run.analysis, "models", role)
        bins = [
            (float(b["low"]), float(b["high"]), int(b["count"]), int(b["correct"]), number(b.get("confidence")))
            for b in model.get("bins") or ()
        ]
        if not any(b[2] for b in bins):
            continue
        rows = [
            [f"{low:.0%}–{high:.0%}", fmt.count(n), fmt.percent(confidence), fmt.percent(right / n if n else None)]
            for low, high, n, right, confidence in bins
            if n
        ]
        error = number(model.get("ece"))
        title = f"{role} · ECE {fmt.fixed(error)}"
        svg = _charts.calibration(bins, title=f"Reliability of the {role}", style=role)
        found.append(Chart(title, svg, "", Table(["confidence", "items", "claimed", "right"], rows)))
    return found


def classes(run: Run) -> dict[str, Any] | None:
    """The change of each class, or, with nothing to compare with, its accuracy."""
    names = [str(n) for n in run.analysis.get("classes") or ()]
    support = run.analysis.get("support") or [None] * len(names)
    by_role = {r: list(section(run.analysis, "models", r).get("class_accuracy") or ()) for r in ("teacher", "baseline", "student")}
    if not names or len(by_role["student"]) != len(names):
        return None
    against = next((r for r in ("baseline", "teacher") if len(by_role[r]) == len(names)), None)
    rows = []
    for i, name in enumerate(names):
        values = {r: number(v[i]) if len(v) == len(names) else None for r, v in by_role.items()}
        own, other = values["student"], values[against] if against else 0.0
        if own is not None and other is not None:
            rows.append({"name": name, "items": support[i], "values": values, "change": own - other})
    if not rows:
        return None
    rows.sort(key=lambda row: (-row["change"], row["name"]))
    counts = {
        "better": sum(row["change"] > 0 for row in rows),
        "worse": sum(row["change"] < 0 for row in rows),
        "empty": len(names) - len(rows),
    }
    counts["same"] = len(rows) - counts["better"] - counts["worse"]
    cut = len(rows) > ALL_CLASSES
    common = [row for row in rows if row["items"] is None or row["items"] >= FEW]
    few = 0
    if cut and len(common) > 2 * CLASS_ROWS:
        rows, few = common, len(rows) - len(common)
    low, high = min(0.0, *(row["change"] for row in rows)), max(0.0 if against else 1.0, *(row["change"] for row in rows))
    scale = 100 / ((high - low) or 1.0)
    for row in rows:
        row["left"], row["width"] = (min(row["change"], 0.0) - low) * scale, abs(row["change"]) * scale
    return {
        **counts,
        "few": few,
        "zero": -low * scale,
        "against": against,
        "roles": [r for r in ("teacher", "baseline", "student") if against and len(by_role[r]) == len(names)],
        "top": rows[:CLASS_ROWS] if cut else rows,
        "between": len(rows) - 2 * CLASS_ROWS if cut else 0,
        "bottom": rows[-CLASS_ROWS:] if cut else [],
        "total": len(names),
    }


def confusions(run: Run) -> Table | None:
    names = [str(n) for n in run.analysis.get("classes") or ()]
    counts = {
        role: {(c["label"], c["predicted"]): c["count"] for c in section(run.analysis, "models", role).get("confusions") or ()}
        for role in ("student", "baseline", "teacher")
    }
    listed = [(pair, n) for pair, n in counts["student"].items() if n > 1][:10]
    if not listed:
        return None
    others = [role for role in ("baseline", "teacher") if counts[role]]
    rows = [
        [*(fmt.clip(_name(names, c), 36) for c in pair), fmt.count(n), *(fmt.count(counts[r].get(pair)) for r in others)]
        for pair, n in listed
    ]
    return Table(["true class", "answered", "student", *others], rows)


GROUPS = (
    (
        "student_wrong",
        "The teacher is right, the student is not",
        "What got lost. Look for a kind of input that the student cannot tell apart.",
    ),
    ("teacher_wrong", "The student is right, the teacher is not", "Where the student did not repeat its teacher's mistakes."),
    ("both_wrong", "Both are wrong, in different ways", "Often hard items, or wrong labels in the test data."),
    ("mistakes", "Its most confident mistakes", "Hard items, systematic errors, or wrong labels in the test data."),
)


def samples(run: Run) -> list[dict[str, Any]]:
    names = [str(n) for n in run.analysis.get("classes") or ()]
    found = []
    for key, title, reading in GROUPS:
        group = section(run.analysis, "samples", "groups", key)
        if group:
            items = [_sample(item, names) for item in group.get("items") or () if isinstance(item, Mapping)]
            found.append({"title": title, "reading": reading, "count": int(group.get("count") or 0), "items": items})
    return found


def _sample(item: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    truth = item.get("label")
    png, text = item.get("png"), item.get("text")
    try:
        image = isinstance(png, str) and base64.b64decode(png, validate=True).startswith(b"\x89PNG")
    except binascii.Error:
        image = False
    said = section(item, "answers")
    return {
        "index": item.get("index"),
        "label": fmt.clip(_name(names, truth), NAME_LIMIT),
        "png": png if image else None,
        "text": fmt.clip(str(text), TEXT_LIMIT) if text is not None else None,
        "answers": [
            {
                "role": role,
                "name": fmt.clip(_name(names, answer.get("class")), NAME_LIMIT),
                "confidence": fmt.percent(number(answer.get("confidence")), 0),
                "right": answer.get("class") == truth,
            }
            for role in ("teacher", "student")
            if (answer := section(said, role))
        ],
    }


def _name(names: Sequence[str], index: Any) -> str:
    return names[index] if isinstance(index, int) and 0 <= index < len(names) else fmt.UNKNOWN if index is None else str(index)
