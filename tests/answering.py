"""The Python of an artifact's README, run as a stranger would, and image files of several kinds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ALONE = """
import runpy, sys
class Never:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in ("torch", "limbeck", "transformers", "torchvision"), name
sys.meta_path.insert(0, Never())
runpy.run_path("answer.py", run_name="__main__")
"""


def answer(artifact: Path, *arguments: str, python: Path | None = None) -> dict[str, float]:
    """Label to probability, the best first, from a process that can import neither torch nor Limbeck; or from another Python, as it is."""
    readme = (artifact / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (artifact / "answer.py").write_text(code, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", ALONE] if python is None else [str(python), "answer.py"]
    done = subprocess.run([*command, *arguments], cwd=artifact, env=environment, capture_output=True, text=True, encoding="utf-8")
    (artifact / "answer.py").unlink()
    assert done.returncode == 0, done.stderr
    return {label: float(p) for label, p in (line.split("\t") for line in done.stdout.splitlines())}


def photos(folder: Path) -> list[Path]:
    """Colour, grey, a palette, alpha, and one that EXIF turns."""
    from PIL import Image

    rng = np.random.default_rng(0)
    found = []
    kinds: tuple[tuple[str, str, tuple[int, int], dict[str, Any]], ...] = (
        ("rgb.png", "RGB", (30, 21), {}),
        ("grey.png", "L", (8, 8), {}),
        ("palette.png", "P", (17, 40), {}),
        ("alpha.png", "RGBA", (9, 9), {}),
        ("turned.jpg", "RGB", (31, 22), {"turn": 6}),
    )
    for name, mode, size, save in kinds:
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
        exif = Image.Exif()
        if save:
            exif[0x0112] = save["turn"]
        image.save(folder / name, exif=exif)
        found.append(folder / name)
    return found
