"""Several test hosts on this machine: a network namespace each, on one bridge, with working folders that only they see; and torchrun on all of them.

    python tests/hosts.py FOLDER FOLDER [...] [--each N] [--torchrun OPTION ...] -- distill recipe.yaml --out run

A FOLDER is the working folder of one host; the first one's is that of the main rank. What a host prints goes to FOLDER/said.txt, the exit code of its
torchrun to FOLDER/code. Needs Linux, iproute2 and util-linux, and root (or user namespaces).

Everything happens inside namespaces of a process that is their first one: when it ends, or its parent does, even by SIGKILL, the kernel ends all
processes in them and takes interfaces, mounts and namespaces away. There is nothing to tidy up.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PORT = 29400
INSIDE = "LIMBECK_TEST_HOSTS"


def missing() -> str:
    """Why hosts cannot be made here; empty where they can."""
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(program, path=_path()) is None:
            return f"there is no `{program}` (Debian: apt-get install {package})"
    tried = subprocess.run(
        [*_namespaces(), "sh", "-c", "mount -t tmpfs none /run && mkdir /run/netns && ip netns add one && ip link add hub type bridge"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": _path()},
    )
    return "" if tried.returncode == 0 else f"no network namespaces: {tried.stderr.strip()[-200:]}"


def start(folders: list[Path], arguments: list[str], each: int = 1, torchrun: list[str] | None = None) -> subprocess.Popen[bytes]:
    """``torchrun -m limbeck ARGUMENTS`` on as many hosts as there are folders."""
    options = [f"--torchrun={option}" for option in torchrun or []]
    own = [sys.executable, __file__, *map(str, folders), "--each", str(each), *options, "--", *arguments]
    return subprocess.Popen([*_namespaces(), *own], env={**os.environ, "PATH": _path(), INSIDE: "1"}, start_new_session=True)


def send(started: subprocess.Popen[bytes], number: int) -> None:
    """A signal to torchrun on every host (`unshare` itself takes none while it waits)."""
    for child in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split():
        os.kill(int(child), number)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _namespaces() -> list[str]:
    whoever = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *whoever, "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _address(number: int) -> str:
    return f"10.77.0.{number}"


def _connect(count: int) -> None:
    """Namespaces host-1, host-2 ..., each with an eth0 on one bridge."""
    _run("mount", "-t", "tmpfs", "none", "/run")
    Path("/run/netns").mkdir()
    _run("ip", "link", "add", "hub", "type", "bridge")
    _run("ip", "link", "set", "hub", "up")
    for number in range(1, count + 1):
        host, port = f"host-{number}", f"port-{number}"
        _run("ip", "netns", "add", host)
        _run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
        _run("ip", "link", "set", port, "master", "hub", "up")
        _run("ip", "-n", host, "addr", "add", f"{_address(number)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", host, "link", "set", device, "up")


def _host(number: int, folders: list[Path], arguments: list[str], each: int, torchrun: list[str]) -> subprocess.Popen[bytes]:
    """One host's torchrun, in its folder; the other hosts' folders are empty to it."""
    own = folders[number - 1]
    hidden = " && ".join(["true", *(f"mount -t tmpfs none '{folder}'" for folder in folders if folder != own)])
    command = [
        *("ip", "netns", "exec", f"host-{number}", "sh", "-c", f'{hidden} && exec "$@"', "sh"),
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(folders)), "--nproc-per-node", str(each)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{_address(1)}:{PORT}", "--rdzv-id", "test"),
        *("--rdzv-conf", f"is_host={str(number == 1).lower()}", "--local-addr", _address(number), *torchrun),
        *("-m", "limbeck", *arguments),
    ]
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "LIMBECK_CACHE": str(own / "teachers"),
    }
    with (own / "said.txt").open("wb") as said:
        return subprocess.Popen(command, cwd=own, env=environ, stdout=said, stderr=said)


def _inside(given: argparse.Namespace) -> int:
    _connect(len(given.folders))
    hosts = [_host(n, given.folders, given.arguments, given.each, given.torchrun) for n in range(1, len(given.folders) + 1)]

    def forward(number: int, frame: object) -> None:
        for host in hosts:
            if host.poll() is None:
                host.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    codes = [host.wait() for host in hosts]
    for folder, code in zip(given.folders, codes, strict=True):
        (folder / "code").write_text(f"{code}\n", encoding="utf-8")
    return next((1 for code in codes if code), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=lambda text: Path(text).resolve(), metavar="FOLDER")
    parser.add_argument("--each", type=int, default=1, metavar="N", help="processes on a host (1)")
    parser.add_argument(
        "--torchrun", action="append", default=[], metavar="OPTION", help="a further option of torchrun, as --torchrun=OPTION"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="of limbeck")
    own, after = sys.argv[1:], []
    if "--" in own:
        own, after = own[: own.index("--")], own[own.index("--") + 1 :]
    given = parser.parse_args(own)
    given.arguments = after
    if os.environ.pop(INSIDE, None):
        return _inside(given)
    why = missing()
    if why:
        parser.error(why)
    started = start(given.folders, given.arguments, given.each, given.torchrun)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: send(started, number))
    code = started.wait()
    for folder in given.folders:
        print(f"== {folder}\n{(folder / 'said.txt').read_text(encoding='utf-8')}", end="")
    return code


if __name__ == "__main__":
    sys.exit(main())
