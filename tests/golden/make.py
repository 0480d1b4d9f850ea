"""Make the golden files: a checkpoint, a cache, a run and a recipe of this version, which later versions must load or refuse.

    python tests/golden/make.py

They are made once for each format, and kept when the format changes: a later version that cannot read them has to say so, with what to do.
``HERE`` stands in them for this folder.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from faults.inside import state_digest  # noqa: E402
from faults.r13_old_files import logits_of  # noqa: E402
from running import fork, make_folder, read, recipe, steps, wait_for  # noqa: E402

KEPT = {
    "run": ("recipe.yaml", "environment.json", "log.jsonl", "metrics.json", "analysis.json", "student/*", "baseline/*"),
    "stopped": ("recipe.yaml", "environment.json", "log.jsonl", "checkpoints/*/*/*"),
    "cache": ("*/manifest.json", "*/manifest.copy.json", "*/figures.json", "*/*.arrow"),
}


def make(work: Path) -> dict[str, Any]:
    from limbeck import checkpoint
    from limbeck.cache import Reader

    make_folder(work)
    named = {"source": f"npz:{work}/pictures.npz"}
    models = {role: {"model": f"python:{work}/nets.py:{role}"} for role in ("teacher", "student")}
    path = {"mode": "auto", "path": str(work / "cache")}
    plain = recipe(work, "recipe.json", data=named, teacher_cache=path, train={"checkpoint_every": 2}, **models)
    process = fork("distill", plain, "--out", work / "run", said=work / "said")
    process.communicate(timeout=600)
    assert process.returncode == 0, (work / "said").read_text()
    process = fork("distill", plain, "--out", work / "stopped", said=work / "said", SLOW="0.3")
    wait_for(process, lambda: len(steps(work / "stopped", "baseline")) >= 3)
    process.kill()
    process.communicate(timeout=600)
    found = checkpoint.load_newest(work / "stopped" / "checkpoints" / "baseline")
    assert found is not None
    readers = [Reader(p.parent) for p in sorted((work / "cache").glob("*/manifest.json"))]
    return {
        "checkpoint": {"role": "baseline", "step": found[0], "digest": state_digest(found[1])},
        "cache": {reader.folder.name: [[part.name, part.rows] for part in reader.manifest.parts] for reader in readers},
        "run": {"logits": logits_of(work / "run"), "metrics": read(work / "run" / "metrics.json")["models"]["student"]["metrics"]},
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        expected = make(work)
        for name, patterns in KEPT.items():
            shutil.rmtree(HERE / name, ignore_errors=True)
            for pattern in patterns:
                for path in work.joinpath(name).glob(pattern):
                    target = HERE / path.relative_to(work)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes().replace(str(work).encode(), b"HERE"))  # what has a hash over it holds no path
        for name in ("nets.py", "pictures.npz", "recipe.json"):
            (HERE / name).write_bytes((work / name).read_bytes().replace(str(work).encode(), b"HERE"))
        for name in ("run", "stopped"):  # of the machine that they were made on
            file = HERE / name / "environment.json"
            file.write_text(json.dumps({**read(file), "command": [], "git": None, "platform": ""}, indent=2) + "\n", encoding="utf-8")
        (HERE / "expected.json").write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
