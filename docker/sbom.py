"""Write what an image is made of, as CycloneDX 1.5 JSON: python docker/sbom.py [FILE]

Python packages that this interpreter finds, and Debian packages where dpkg has a record. Standard library only; no time and no serial number, so that
the same image gives the same bytes.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

STATUS = Path("/var/lib/dpkg/status")


def main(arguments: list[str]) -> int:
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": "limbeck", "bom-ref": "limbeck-image"}},
        "components": [*python_packages(), *debian_packages()],
    }
    text = json.dumps(bill, indent=1) + "\n"
    if arguments:
        Path(arguments[0]).write_text(text, encoding="utf-8")
        print(f"{arguments[0]}: {len(bill['components'])} components")
    else:
        print(text, end="")
    return 0


def python_packages() -> list[dict[str, Any]]:
    """One a name; the first on the path counts, as it does for an import."""
    found: dict[str, str] = {}
    for one in importlib.metadata.distributions():
        name = one.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), one.version)
    return [_component(name, version, f"pkg:pypi/{name}@{quote(version, safe='')}") for name, version in sorted(found.items())]


def debian_packages() -> list[dict[str, Any]]:
    if not STATUS.is_file():
        return []
    form = "${db:Status-Abbrev}\t${Package}\t${Version}\t${Architecture}\n"
    lines = subprocess.run(["dpkg-query", "--show", f"--showformat={form}"], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = sorted(line.split("\t")[1:] for line in lines if line.startswith("ii"))
    system = re.search(r"^ID=\"?(\w+)", Path("/etc/os-release").read_text(encoding="utf-8"), re.MULTILINE)
    where = system[1] if system else "debian"
    return [_component(name, version, f"pkg:deb/{where}/{name}@{quote(version, safe='')}?arch={arch}") for name, version, arch in rows]


def _component(name: str, version: str, purl: str) -> dict[str, Any]:
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
