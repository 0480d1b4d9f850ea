"""Run the benchmarks of docs/benchmarks.md and write benchmarks/results/bench/bench-P1.json ...

python benchmarks/bench.py               all rows but P10, which takes long, then the table in docs/benchmarks.md
python benchmarks/bench.py P1 P6         these rows
python benchmarks/bench.py --quick P1    small settings: to see that a row runs; its result goes to benchmarks/.work/quick/
python benchmarks/bench.py --peers       make the peers' environment (benchmarks/.peers), which P5 to P7 need
python benchmarks/bench.py --table       write the table from the results; with --check: say whether it is up to date
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from speed import measuring, page, peers
from speed.rows import ROWS, judge


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    for option in ("--quick", "--peers", "--table", "--check"):
        arguments.add_argument(option, action="store_true")
    asked = arguments.parse_args()
    unknown = [row for row in asked.rows if row not in ROWS]
    if unknown:
        arguments.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if asked.table:
        return page.write(check=asked.check)
    if asked.peers:
        return peers.install()
    failed = [name for name in asked.rows or [name for name, row in ROWS.items() if not row.alone] if not run(name, asked.quick)]
    if not asked.quick:
        page.write()
    if failed:
        print(f"no result: {', '.join(failed)}")
    return 1 if failed else 0


def run(name: str, quick: bool) -> bool:
    row = ROWS[name]
    print(f"{name}: {row.what}", flush=True)
    where, start = measuring.machine(), time.perf_counter()
    try:
        if row.needs_peers:
            peers.install()
        measured = row.run(quick)
    except Exception:  # the other rows are measured all the same
        traceback.print_exc()
        return False
    result = {
        "id": name,
        "what": row.what,
        "against": row.against,
        "target": row.target,
        "command": f"python benchmarks/bench.py {name}" + (" --quick" if quick else ""),
        "seed": measuring.SEED,
        "machine": where,
        "minutes": (time.perf_counter() - start) / 60,
        **judge(name, row, measured),
    }
    path = measuring.write(result, quick=quick)
    for line in page.figures(result):
        print(f"    {line}")
    print(
        f"    {'pass' if result['pass'] else 'reported' if result['pass'] is None else 'miss'}; {result['minutes']:.1f} min; {path.name}",
        flush=True,
    )
    return True


if __name__ == "__main__":
    sys.exit(main())
