"""Write the outcome of runs as one JSON file under benchmarks/results/.

    python benchmarks/collect.py NAME RUN [RUN ...]

Keeps what was measured and where (metrics, cost, choices, versions), without paths of the machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
KEPT = ("task", "seeds", "models", "gap_closed", "interval", "verdict", "cost", "export", "data", "runs", "best_seed")
ENVIRONMENT = ("python", "platform", "cpu_count", "packages", "device", "device_name", "threads", "choices", "started")


def collect(run: Path) -> dict[str, Any]:
    metrics = json.loads((run / "metrics.json").read_text())
    environment = json.loads((run / "environment.json").read_text())
    recipe = (run / "recipe.yaml").read_text()
    return {
        "run": run.name,
        "metrics": {k: metrics[k] for k in KEPT if k in metrics},
        "environment": {k: environment[k] for k in ENVIRONMENT if k in environment},
        "recipe": [_without_folders(line) for line in recipe.splitlines()],
    }


def _without_folders(line: str) -> str:
    """An absolute path in a recipe shows its last two parts."""
    head, slash, tail = line.partition("/")
    return line if not slash or not tail else head + ".../" + "/".join(tail.split("/")[-2:])


def main() -> None:
    name, *runs = sys.argv[1:]
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps({"name": name, "runs": [collect(Path(run)) for run in runs]}, indent=1) + "\n")
    print(f"wrote {target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}")


if __name__ == "__main__":
    main()
