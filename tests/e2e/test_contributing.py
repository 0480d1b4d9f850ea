"""CONTRIBUTING's "How to add a loss", followed to the letter on a copy of the sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from running import ROOT


def blocks() -> list[str]:
    """The Python pieces of the section, in order."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## How to add a loss\n")[2].partition("\n## ")[0]
    return [textwrap.dedent(found) for found in re.findall(r"^ *```python\n(.*?)^ *```$", section, re.DOTALL | re.MULTILINE)]


def call(copy: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{copy / 'src'}{os.pathsep}{copy / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_loss_is_a_function_a_row_and_its_numbers(tmp_path: Path) -> None:
    for name in ("src", "tests", "pyproject.toml"):
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    function, imported, row, numbers, run = blocks()
    losses = tmp_path / "src" / "limbeck" / "losses"

    logits = losses / "logits.py"
    logits.write_text(logits.read_text() + "\n\n" + function)
    table = losses / "_table.py"
    text = table.read_text()
    assert text.count("_ROWS = (\n") == 1
    at = text.index("from limbeck.losses.logits")
    text = text[:at] + imported + text[at:]
    table.write_text(text.replace("_ROWS = (\n", "_ROWS = (\n" + textwrap.indent(row.rstrip() + ",\n", "    ")))
    (tmp_path / "add_case.py").write_text(numbers)
    call(tmp_path, "add_case.py")
    tests = tmp_path / "tests" / "reference" / "test_losses.py"
    text = tests.read_text()
    head = "BUILT: dict[str, Callable[[Case, Inputs], Made]] = {\n"
    assert text.count(head) == 1
    tests.write_text(text.replace(head, head + textwrap.indent(run, "    ")))

    assert "squared: Match probabilities, squared." in call(tmp_path, "-m", "limbeck", "losses", "squared")
    assert "| squared |" in call(tmp_path, "-m", "limbeck", "losses", "--markdown").replace("[squared](#squared)", "squared")
    ran = call(tmp_path, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "tests/unit/test_losses.py", "-k", "squared")
    assert ran.count("PASSED") >= 20
    held = call(tmp_path, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "tests/reference", "-k", "squared")
    assert held.count("PASSED") == 1
    call(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--doctest-modules", "src/limbeck/losses/logits.py")
    given = {"teacher": "a", "student": "b", "data": "digits", "objective": [{"loss": "squared", "weight": 2, "temperature": 3}]}
    read = f"from limbeck.reading import build_recipe; print(build_recipe({given!r}, command='distill').objective[0].loss)"
    assert call(tmp_path, "-c", read).strip() == "squared"
