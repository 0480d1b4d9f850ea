"""Run the long version of a row of docs/reliability.md, and write its counts into the table there.

    python tests/faults/run.py R1 [--count N]     one row
    python tests/faults/run.py                    all of them
    python tests/faults/run.py --table            only the table, from benchmarks/results/faults/

A row is a module ``rNN_NAME.py`` beside this one with ``run(count: int | None) -> dict``: ``id``, ``promise``, ``tried``, ``held``, and
``details``, whose ``failed`` is empty where all held.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "faults"
DOCUMENT = ROOT / "docs" / "reliability.md"
START, END = "<!-- table: written by tests/faults/run.py -->", "<!-- end of the table -->"


def modules() -> dict[str, str]:
    """The module of each row, by its id: ``R1`` is in ``r01_*.py``, ``R6-ranks`` in ``r06_ranks.py``."""
    found = sorted(HERE.glob("r[0-9][0-9]_*.py"))
    return {f"R{int(path.stem[1:3])}{'-ranks' if path.stem.endswith('_ranks') else ''}": f"faults.{path.stem}" for path in found}


def table() -> str:
    """Every row that has been run."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("R*.json")]
    text = ["| row | promise | tried | held | of which | when |", "|---|---|---:|---:|---|---|"]
    for row in sorted(rows, key=lambda r: (int(r["id"][1:].partition("-")[0]), r["id"])):
        details = "; ".join(_shown(name, value) for name, value in row["details"].items() if name != "failed" and value)
        text.append(
            f"| {row['id']} | {row['promise']} | {row['tried']:,} | {row['held']:,} | {details} | {row['date']} |".replace("\n", " ")
        )
    return "\n".join(text)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key} {_number(inner)}" for key, inner in value.items())
    elif isinstance(value, list):
        value = ", ".join(_number(inner) for inner in value)
    return f"{name}: {_number(value)}"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_table() -> None:
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{START}\n{table()}\n{END}{after}", encoding="utf-8")


def run_row(name: str, count: int | None) -> dict[str, Any]:
    import torch

    began = time.time()
    found: dict[str, Any] = importlib.import_module(modules()[name]).run(count)
    about = {"date": time.strftime("%Y-%m-%d"), "seconds": round(time.time() - began), "python": platform.python_version()}
    result = {
        **found,
        **about,
        "torch": torch.__version__,
        "command": f"python tests/faults/run.py {name}" + (f" --count {count}" if count else ""),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(modules())}; all of them by default")
    parser.add_argument("--count", type=int, metavar="N", help="how many are tried; by default as many as the table says")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    unknown = [name for name in given.rows if name not in modules()]
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; there are {', '.join(modules())}")
    failed = 0
    for name in [] if given.table else given.rows or modules():
        result = run_row(name, given.count)
        print(f"{name}: {result['held']} of {result['tried']} held")
        failed += result["held"] != result["tried"]
    write_table()
    return min(failed, 1)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    sys.exit(main())
