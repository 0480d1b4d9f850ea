"""Another side as several ranks: ``script`` once for each of ``ranks`` processes, with the variables that torchrun sets. The first takes turns."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def main() -> int:
    config = json.loads(sys.argv[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = config["ranks"]
    world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    turns = {name: os.environ.pop(name) for name in ("TURN_FROM", "TURN_TO")}
    command = [sys.executable, str(Path(__file__).with_name(config["script"])), sys.argv[1]]
    processes = []
    for rank in range(size):
        own = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), **(turns if rank == 0 else {})}
        passed = tuple(map(int, turns.values())) if rank == 0 else ()
        processes.append(subprocess.Popen(command, env=own, pass_fds=passed))
    for descriptor in turns.values():
        os.close(int(descriptor))
    return max(abs(process.wait()) for process in processes)


if __name__ == "__main__":
    sys.exit(main())
