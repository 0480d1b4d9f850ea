"""Write the tables of README.md from benchmarks/results/*.json, between the two marks.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results -->", "<!-- /results -->"
ROLES = ("teacher", "baseline", "student")


def table(result: dict[str, Any]) -> list[str]:
    """One distillation: teacher, baseline and student in a table, and what it took."""
    run = result["runs"][-1]
    metrics, where = run["metrics"], run["environment"]
    seeds = metrics["seeds"]
    lines = [
        f"**{result['name']}** (`make {result['name']}`; seeds {', '.join(map(str, seeds))}; mean and standard deviation over seeds)",
        "",
        "| | test accuracy | NLL | ECE | parameters | MFLOPs | latency p50, batch 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for role in ROLES:
        found = metrics["models"].get(role)
        if found is None:
            continue
        std = (found.get("metrics_std") or {}).get("accuracy") if role != "teacher" else None
        accuracy = f"{100 * found['metrics']['accuracy']:.2f} %" + (f" ± {100 * std:.2f}" if std is not None else "")
        flops = "–" if found["flops"] is None else f"{found['flops'] / 1e6:,.1f}"
        lines.append(
            f"| {role} | {accuracy} | {found['metrics']['nll']:.3f} | {found['metrics']['ece']:.3f} | {found['parameters']:,} | {flops} "
            f"| {found['latency_ms']['p50']:.2f} ms |"
        )
    packages = where["packages"]
    cost = metrics["cost"]
    lines += [
        "",
        metrics["verdict"],
        "",
        f"Training took {cost['train_seconds'] / 60:.0f} minutes for the students and {cost['baseline_seconds'] / 60:.0f} for the baselines on "
        f"{where['device_name']}, {where['threads']} thread{'s' if where['threads'] != 1 else ''}, torch {packages['torch']}, beside other work; "
        f"whole record: [`benchmarks/results/{result['name']}.json`](benchmarks/results/{result['name']}.json).",
        "",
    ]
    return lines


def main() -> None:
    results = [json.loads(p.read_text()) for p in sorted((ROOT / "benchmarks/results").glob("*.json"))]
    results = [r for r in results if "runs" in r]  # others have tables of their own
    body = "\n".join([START, "", *[line for r in results for line in table(r)], END])
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, _, rest = text.partition(START)
    _, found, tail = rest.partition(END)
    new = head + body + (tail if found else rest)
    if "--check" in sys.argv:
        sys.exit(0 if new == text else "README.md is not what benchmarks/results say: run python benchmarks/tables.py")
    readme.write_text(new)


if __name__ == "__main__":
    main()
