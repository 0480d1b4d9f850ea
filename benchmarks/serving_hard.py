"""Whether the server bears clients that mean it no good: slow ones beside a good one, and requests that are no requests.

    python benchmarks/serving_hard.py RUN [--slow 200] [--seconds 5] [--pairs 7] [--requests 100000]

Slow: `--slow` clients that send a header a byte at a time and as many that send a body so, and one good client whose 99th percentile is measured
with and without them, in turns (A B B A ...); the ratio is the median over pairs with a bootstrap 95 % interval. Fuzzed: `--requests` requests
by a seeded generator (bytes of good ones changed, cut and doubled; shapes, kinds and lengths that lie; images and forms that are none; wild paths,
methods and headers; plain noise) over 32 connections. Counted are the answers; looked at are the server's resident memory and open files, after
2,000 requests and at the end. Everything shares one machine. Writes benchmarks/results/serving-hard.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from serving import free_port, interval, load, question, wait_for

HERE = Path(__file__).parent
CONNECTIONS, WARM = 32, 2000


async def slow_client(port: int, head: bool, number: int) -> None:
    """Sends a byte now and then, as often as it is let in again."""
    beginning = b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\n" + (b"" if head else b"content-length: 100000\r\n\r\n")
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(beginning)
            for i in range(100000):
                await asyncio.sleep(0.5 + 0.001 * (number % 100))
                writer.write(b"a" if not head else f"x-{i}: a\r\n".encode()[:1])
                await writer.drain()
                if reader.at_eof():
                    break
            writer.close()
        await asyncio.sleep(0.2)


async def beside(port: int, request: bytes, slow: int, seconds: float) -> list[float]:
    """The good client's milliseconds, beside so many slow ones of each kind."""
    tasks = [asyncio.create_task(slow_client(port, head, i)) for head in (True, False) for i in range(slow)]
    await asyncio.sleep(2.0 if slow else 0.2)
    try:
        return await load(port, request, 1, seconds)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def mangled(draw: random.Random, good: bytes) -> bytes:
    """The bytes of a good request with something wrong in them."""
    head, _, body = good.partition(b"\r\n\r\n")
    match draw.randrange(10):
        case 0:  # bytes of the body changed
            changed = bytearray(body)
            for _ in range(draw.randrange(1, 20)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            return head + b"\r\n\r\n" + bytes(changed)
        case 1:  # shorter or longer than it says, by its own account
            cut = body[: draw.randrange(len(body))] * draw.randrange(1, 3)
            return _with_length(head, cut)
        case 2:  # JSON of another kind
            values: list[Any] = [
                None,
                True,
                -1,
                10**30,
                "x" * draw.randrange(3000),
                [[]],
                {},
                {"inputs": None},
                {"inputs": [{}]},
                [[[[1]]]],
            ]
            shape = [draw.choice([-1, 0, 1, 2**40, 3.5, "1"]) for _ in range(draw.randrange(6))]
            one = {
                "name": draw.choice(["image", "x", "", "é", 3]),
                "shape": shape,
                "datatype": draw.choice(["FP32", "INT64", "BYTES", "", 7]),
            }
            one["data"] = draw.choice([[], [1.0] * draw.randrange(4000), "a", None, [[1], [1, 2]], [float("nan")]])
            body = json.dumps(draw.choice([*values, {"inputs": [one] * draw.randrange(3)}])).encode()
            return _request(draw.choice(["/v2/models/m/infer", "/predict"]), body, "application/json")
        case 3:  # an image that is none, or one that lies about its size
            png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + draw.randbytes(8) + b"\x08\x02\0\0\0" + draw.randbytes(draw.randrange(200))
            jpeg = b"\xff\xd8\xff\xe0" + draw.randbytes(draw.randrange(500))
            return _request(
                "/predict", draw.choice([png, jpeg, draw.randbytes(300), b""]), draw.choice(["image/png", "image/jpeg", "image/x"])
            )
        case 4:  # forms
            form = (
                b"--b\r\ncontent-disposition: form-data; name=file; filename=a\r\n\r\n"
                + draw.randbytes(100)
                + b"\r\n--b"
                + b"--" * draw.randrange(2)
            )
            return _request("/predict", form[: draw.randrange(len(form))], "multipart/form-data; boundary=b")
        case 5:  # paths and methods
            path = "/" + "".join(draw.choice("abm/%20.?=&é{}\\v2") for _ in range(draw.randrange(60)))
            method = draw.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "BREW"])
            return f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode("latin-1", "replace")
        case 6:  # headers
            length = draw.choice(["-1", "1e3", "99999999999999999999", "0x10", "", "12,12"])
            return f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n{'x: y' * draw.randrange(300)}\r\n\r\n".encode()
        case 7:  # chunks
            chunks = b"".join(f"{draw.choice(['5', 'fffffffff', 'g', '-1'])}\r\nhello\r\n".encode() for _ in range(draw.randrange(4)))
            return b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
        case 8:  # noise
            return draw.randbytes(draw.randrange(1, 400))
        case _:  # the length of the JSON lies
            lies = str(draw.choice([-5, 0, 1, len(body), len(body) + 9, 2**70]))
            lines = [f"inference-header-content-length: {lies}".encode() if b"inference" in line else line for line in head.split(b"\r\n")]
            return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _with_length(head: bytes, body: bytes) -> bytes:
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"content-length")]
    return b"\r\n".join([*lines, f"content-length: {len(body)}".encode()]) + b"\r\n\r\n" + body


def _request(path: str, body: bytes, kind: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def fuzz(port: int, good: bytes, requests: int, seed: int) -> Counter[str]:
    """Answers by status; ``closed`` where the connection ended without one. A tenth of the requests are good."""
    answers: Counter[str] = Counter()
    left = iter(range(requests))

    async def one(worker: int) -> None:
        draw = random.Random(f"{seed} {worker}")
        for _ in left:
            spoilt = draw.random() < 0.9
            request = mangled(draw, good) if spoilt else good
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request)
                # what says that more is to come is not waited for
                line = await asyncio.wait_for(reader.readline(), 0.25 if spoilt else 60)
                answers[line.split(b" ")[1].decode() if line.startswith(b"HTTP/") else "closed"] += 1
                writer.close()
            except TimeoutError:
                answers["given up by the client" if spoilt else "silent to a good one"] += 1
                writer.close()
            except OSError:
                answers["closed"] += 1

    await asyncio.gather(*(one(i) for i in range(CONNECTIONS)))
    return answers


def held(pid: int) -> dict[str, int]:
    """Resident bytes and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return {"resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"), "open_files": len(os.listdir(f"/proc/{pid}/fd"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--slow", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serving-hard.json")
    given = parser.parse_args()
    request, _ = question(given.run)
    port = free_port()
    command = [sys.executable, "-m", "limbeck", "serve", f"m={given.run}", "--port", str(port), "--threads", "1", "--no-access-log"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        asyncio.run(load(port, request, 4, 1.0))  # warm-up, left out
        tails: dict[str, list[float]] = {"alone": [], "beside": []}
        for pair in range(given.pairs):
            for name in ("alone", "beside") if pair % 2 == 0 else ("beside", "alone"):
                times = asyncio.run(beside(port, request, given.slow if name == "beside" else 0, given.seconds))
                tails[name].append(float(np.quantile(times, 0.99)))
        warm = asyncio.run(fuzz(port, request, WARM, 1))
        time.sleep(3)
        before = held(server.pid)
        began = time.perf_counter()
        answers = asyncio.run(fuzz(port, request, given.requests, 2))
        took = time.perf_counter() - began
        time.sleep(3)
        after = held(server.pid)
        good = asyncio.run(load(port, request, 1, 1.0))
        result = {
            "slow": {
                "clients": [given.slow, given.slow],
                "p99_ms": {name: interval(values) for name, values in tails.items()},
                "ratio": interval([b / a for a, b in zip(tails["alone"], tails["beside"], strict=True)]),
            },
            "fuzzed": {
                "requests": given.requests,
                "seconds": took,
                "answers": dict(sorted((warm + answers).items())),
                "before": before,
                "after": after,
                "grown_bytes": after["resident_bytes"] - before["resident_bytes"],
                "answers_of_a_good_client_after": len(good),
            },
            "machine": {"cpus": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "platform": platform.platform()},
        }
    finally:
        server.terminate()
        code = server.wait(90)
    result["left_with"] = code
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
