"""docs/benchmarks.md from benchmarks/results/bench/*.json: the table is generated, the text around it is the page's own."""

from __future__ import annotations

import sys
from typing import Any

from speed.measuring import RESULTS, ROOT, read_json

PAGE = ROOT / "docs/benchmarks.md"
START, END = "<!-- rows -->", "<!-- /rows -->"


def write(*, check: bool = False) -> int:
    """Put the table between the two marks; ``check``: only say whether it stands there."""
    results = sorted((read_json(path) for path in RESULTS.glob("bench-*.json")), key=lambda r: (r["id"][0], int(r["id"][1:])))
    text = PAGE.read_text()
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    new = head + "\n".join([START, "", *table(results), END]) + tail
    if check:
        if new != text:
            print("docs/benchmarks.md is not what benchmarks/results/bench say: run python benchmarks/bench.py --table", file=sys.stderr)
        return int(new != text)
    PAGE.write_text(new)
    return 0


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = ["| id | what | against | to reach | measured | floor | |", "|---|---|---|---|---|---|---|"]
    for result in results:
        mark = {True: "pass", False: "**miss**", None: "reported"}[result["pass"]]
        cells = [result[k] for k in ("id", "what", "against", "target")]
        lines.append(f"| {' | '.join([*cells, '<br>'.join(figures(result)), floor(result), mark])} |")
    missed = [f"- **{r['id']}**: {r['note']}" for r in results if r.get("note")]
    if missed:
        lines += ["", "What is missed, by how much, why, and what would close it:", "", *missed]
    if results:
        lines += ["", "Where and when:", ""]
        lines += [f"- {', '.join(ids)}: {where}" for where, ids in _places(results).items()]
        lines += ["", "Each row's raw times, command and facts are in `benchmarks/results/bench/`.", ""]
    return lines


def figures(result: dict[str, Any]) -> list[str]:
    """Each figure of a row as a phrase."""
    lines = []
    for figure in result["figures"]:
        value = f"{_number(figure['value'])}{figure['unit'] if figure['unit'] == 'x' else ' ' + figure['unit']}"
        if figure["interval"] is not None:
            low, high = figure["interval"]
            value += f" [{_number(low)}, {_number(high)}]"
        mark = " (miss)" if figure["pass"] is False else ""
        lines.append(f"{figure['what']}: {value}{mark}".replace("|", "/"))
    return lines


def floor(result: dict[str, Any]) -> str:
    found = result.get("floor")
    return "–" if not found else f"{found['what']} {_number(found['ms'])} ms"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 or abs(value) >= 10 else f"{value:.3f}"


def _places(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for result in results:
        m = result["machine"]
        rates = ", ".join(f"{dtype} {rate:,.0f}" for dtype, rate in m["matmul_gflops"].items())
        where = (
            f"{m['cpu']} ({m['capability']}), {m['cpus']} CPUs, {m['threads']} threads, torch {m['torch']}, load before {m['load']:.1f}; "
            f"matrix products {rates} GFLOP/s; {result['minutes']:.1f} min"
        )
        places.setdefault(where, []).append(result["id"])
    return places
