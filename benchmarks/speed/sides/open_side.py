"""Open a cache and read its first batch, in a fresh process (P9): seconds and resident memory, beyond those of the imports."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from limbeck.cache import Reader


def resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def main() -> None:
    folder, keys = Path(sys.argv[1]), np.load(sys.argv[2])
    before, start = resident(), time.perf_counter()
    reader = Reader(folder)
    parts, rows = reader.locate(keys, 0)
    values = reader.gather("logits", parts, rows).astype(np.float32)
    print(json.dumps({"seconds": time.perf_counter() - start, "bytes": resident() - before, "rows": len(values)}))


if __name__ == "__main__":
    main()
