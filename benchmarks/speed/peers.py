"""The peers' environment: benchmarks/.peers, made by pip from benchmarks/peers/requirements.txt with Limbeck's own torch and torchvision."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

from speed.measuring import PEERS, ROOT

REQUIREMENTS = ROOT / "benchmarks/peers/requirements.txt"


def install() -> int:
    """Make it where it is not there, or where the requirements changed."""
    stamp = PEERS.parents[1] / ".installed"
    # pip's names leave local versions (+cu130) out: the same release from the same index
    torches = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in ("torch", "torchvision")]
    wanted = "\n".join([*torches, REQUIREMENTS.read_text()])
    if stamp.is_file() and stamp.read_text() == wanted:
        return 0
    print("installing the peers into benchmarks/.peers", flush=True)
    if not PEERS.exists():
        subprocess.run([sys.executable, "-m", "venv", PEERS.parents[1]], check=True)
    pip = [PEERS, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *torches, "-r", REQUIREMENTS], check=True)
    stamp.write_text(wanted)
    return 0
