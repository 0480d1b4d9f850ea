"""Write the hash-locked requirement files of the images: python3.11 docker/lock.py [NAME ...]

NAME is a folder in docker/locks (torch-2.6.0, torch-2.14.1), or serve, or build; without one, all are written. What is wanted comes from
the extras in pyproject.toml; the versions are the newest that pip finds to fit together on the day. jupyter.txt and ci.txt take over every
version of runtime.txt.

Each file names one wheel a package, by its SHA-256: for CPython 3.11 on Linux x86_64. On another platform or Python run this file there.
A new torch: a line in LINES, one run, and `--build-arg TORCH=...`. Nothing is installed but pip itself, in a temporary folder.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

PYTHON = "3.11.2"  # the oldest that an image may have (Debian 12); a package for 3.11.5 and later would not install there
PIP = "pip==26.3"  # older ones download every wheel for a dry run
ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "docker" / "locks"
LINES = {
    "torch-2.6.0": ["torch==2.6.0", "torchvision==0.21.0"],
    "torch-2.14.1": ["torch==2.14.1", "torchvision==0.29.1"],
}
JUPYTER = ["jupyterlab>=4.4"]
# limbeck itself is installed without its dependencies there; its command line needs the last three.
SERVE = [
    "onnxruntime",
    "numpy",
    "fastapi>=0.115",
    "uvicorn>=0.34",
    "httptools>=0.6",
    "python-multipart>=0.0.18",
    "prometheus-client>=0.21",
    "pillow",
    "typer",
    "pydantic",
    "PyYAML",
]
SERVE_ALONE = ["tokenizers"]  # needs what it names only to ask a hub


def main(names: list[str]) -> int:
    known = [*LINES, "serve", "build"]
    wrong = [name for name in names if name not in known]
    if wrong:
        print(f"No such lock: {', '.join(wrong)}. There are: {', '.join(known)}.", file=sys.stderr)
        return 2
    if sys.version_info[:2] != (3, 11) or sys.platform != "linux":
        print("Note: the images have Python 3.11 on Linux; what is locked here is for this machine.", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PIP], check=True)
        for name in names or known:
            for file, requirements, constraints in _files(name):
                found = _resolved(python, requirements, constraints)
                if name == "serve":
                    found += _resolved(python, _ranged(SERVE_ALONE), None, "--no-deps")
                _write(file, name, found)
    return 0


def wanted(extra: str = "") -> list[str]:
    """The project's own dependencies, with those of an extra and of the extras that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: list[str] = []

    def add(requirements: list[str]) -> None:
        for requirement in requirements:
            own = re.fullmatch(r"limbeck\[([\w,-]+)\]", requirement)
            if own is None:
                found.append(requirement)
            else:
                for inner in own[1].split(","):
                    add(project["optional-dependencies"][inner])

    add(project["dependencies"])
    add(project["optional-dependencies"][extra] if extra else [])
    return list(dict.fromkeys(found))


def _files(name: str) -> list[tuple[Path, list[str], Path | None]]:
    if name == "serve":
        return [(LOCKS / "serve.txt", _ranged(SERVE), None)]
    if name == "build":
        return [
            (LOCKS / "build.txt", tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"], None)
        ]
    folder, runtime = LOCKS / name, LINES[name] + wanted("all")
    first = folder / "runtime.txt"
    return [
        (first, runtime, None),
        (folder / "jupyter.txt", runtime + wanted("notebook") + JUPYTER, first),
        (folder / "ci.txt", runtime + wanted("dev"), first),
    ]


def _ranged(names: list[str]) -> list[str]:
    """With the project's own ranges, where it has them."""
    ranges = {re.split(r"[<>=!\[; ]", text)[0]: text for text in wanted("all")}
    return [ranges.get(name, name) for name in names]


def _resolved(python: str, requirements: list[str], constraints: Path | None, *options: str) -> list[tuple[str, str, str]]:
    """Name, version and SHA-256 of what pip would install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        asked = [
            python,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--ignore-installed",
            "--only-binary",
            ":all:",
            "--quiet",
            "--report",
            str(report),
            *options,
        ]
        asked += ["--python-version", PYTHON, "--target", folder]  # pip takes a version only with a target; nothing is written there
        if constraints is not None:
            pins = Path(folder) / "constraints.txt"
            pins.write_text("\n".join(re.findall(r"^[\w.-]+==[^\s\\]+", constraints.read_text(), re.MULTILINE)))
            asked += ["--constraint", str(pins)]
        subprocess.run([*asked, *requirements], check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return [
        (one["metadata"]["name"].lower(), one["metadata"]["version"], one["download_info"]["archive_info"]["hashes"]["sha256"])
        for one in found
    ]


def _write(file: Path, name: str, found: list[tuple[str, str, str]]) -> None:
    lines = [f"# Made by `python3.11 docker/lock.py {name}` for CPython {sys.version_info[0]}.{sys.version_info[1]} on Linux x86_64.\n"]
    lines += [f"{package}=={version} --hash=sha256:{digest}\n" for package, version, digest in sorted(found)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")
    print(f"{file.relative_to(ROOT)}: {len(found)} packages", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
